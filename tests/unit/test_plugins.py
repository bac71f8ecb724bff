"""Modules that are imported because the person who starts a program says so, and for no other reason."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_gemini import cli, plugins

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def nothing_loaded(monkeypatch):
    monkeypatch.setattr(plugins, "_loaded", [])
    monkeypatch.delenv(plugins.VARIABLE, raising=False)


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a module of a name that no other test has, and gives the name."""
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)

    def module(name: str, text: str = "") -> str:
        (tmp_path / f"{name}.py").write_text(text)
        return name

    yield module
    for name in set(sys.modules) - before:  # so that the next test imports its own
        if getattr(sys.modules[name], "__file__", None) and str(tmp_path) in str(sys.modules[name].__file__):
            del sys.modules[name]


def test_a_plugin_is_imported_once_and_remembered_in_order(module, capsys):
    plugins.load([module("told_first", "print('first')"), module("told_second", "print('second')")])
    plugins.load(["told_second", "told_first", module("told_third")])
    assert capsys.readouterr().out == "first\nsecond\n"
    assert plugins.loaded() == ("told_first", "told_second", "told_third")


def test_a_module_of_a_package_is_loaded(tmp_path, module):
    (tmp_path / "a_package").mkdir()
    (tmp_path / "a_package/__init__.py").write_text("")
    (tmp_path / "a_package/inner.py").write_text("")
    plugins.load(["a_package.inner"])
    assert plugins.loaded() == ("a_package.inner",)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("no_such_plugin", "the plugin no_such_plugin is not there; install it, or put the folder"),
        ("no_such_package.plugin", "the plugin no_such_package.plugin is not there"),
        ("os.no_such_plugin", "the plugin os.no_such_plugin is not there"),
        ("a-plugin", "the plugin 'a-plugin' is no module's name; write it as in an import"),
        ("plugin.py", "the plugin plugin.py is not there"),
        ("folder/plugin", "is no module's name"),
        (".plugin", "is no module's name"),
        ("a b", "is no module's name"),
        ("a\nb", "is no module's name"),
        ("plugin\n", "is no module's name"),
        ("pl\u0443gin", "is no module's name"),
        ("a" * 101, "is no module's name"),
        ("", "is no module's name"),
    ],
)
def test_a_plugin_that_is_not_there_is_told(name, problem):
    with pytest.raises(ValueError, match=problem):
        plugins.load([name])
    assert plugins.loaded() == ()


def test_what_a_plugin_needs_and_what_fails_in_it_is_told(module):
    with pytest.raises(
        ValueError, match=r"^the plugin needy_plugin needs the module no_such_library, which is not inst"
    ):
        plugins.load([module("needy_plugin", "import no_such_library")])
    with pytest.raises(
        ValueError, match=r"^the plugin old_plugin cannot be imported: cannot import name 'nothing' from"
    ):
        plugins.load([module("old_plugin", "from megatron_gemini import nothing")])
    with pytest.raises(ValueError, match=r"broken_plugin failed while it was imported: ZeroDivisionError"):
        plugins.load([module("broken_plugin", "1 / 0")])
    assert plugins.loaded() == ()


@pytest.mark.parametrize(
    ("argv", "rest", "names"),
    [
        ([], [], []),
        (["--train.steps", "3"], ["--train.steps", "3"], []),
        (["--plugin", "a", "--train.steps", "3", "--plugin=b.c"], ["--train.steps", "3"], ["a", "b.c"]),
        (["train", "--plugin", "a"], ["train"], ["a"]),
        (["--plugins", "a"], ["--plugins", "a"], []),
    ],
)
def test_the_options_are_taken_out_of_a_command_line(argv, rest, names):
    assert plugins.take_options(argv) == (rest, names)


@pytest.mark.parametrize("argv", [["--plugin"], ["--plugin="], ["--plugin", "--train.steps", "3"], ["--plugin", "-h"]])
def test_an_option_without_a_name_is_refused(argv):
    with pytest.raises(ValueError, match="--plugin takes the name of a module"):
        plugins.take_options(argv)


def test_the_environment_and_entry_points_of_installed_packages_name_plugins_too(module, tmp_path, monkeypatch):
    for name in ("from_line", "from_variable", "another", "from_package_a", "from_package_b"):
        module(name)
    monkeypatch.setenv(plugins.VARIABLE, "from_variable, another,")
    for package, point in (("one", "z = from_package_a"), ("two", "a = from_package_b:ATTRIBUTE")):
        folder = tmp_path / f"{package}-1.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        (folder / "entry_points.txt").write_text(f"[{plugins.GROUP}]\n{point}\n")
    assert plugins.start(["--plugin", "from_line", "rest"]) == ["rest"]
    # Packages by name and not as the disk lists them: every rank must register in the same order.
    assert plugins.loaded() == ("from_line", "from_variable", "another", "from_package_a", "from_package_b")


@pytest.mark.parametrize(
    ("recorded", "message"),
    [
        (["a.b"], "run was made with the plugins a.b, which are not loaded; if you trust them, add --plugin a.b"),
        (
            ["a", "b"],
            "run was made with the plugins a, b, which are not loaded; if you trust them, add --plugin a --plugin b",
        ),
        (["a", "a"], "run was made with the plugins a, which"),
        ([f"m{n}" for n in range(1000)], "plugins m0, m1, m2, m3, m4 and 995 more, which"),
        (
            ["a", "\x1b[31mred", "; rm -rf /", "x" * 1000],
            "plugins a and 3 more, which are not loaded; if you trust them, add",
        ),
        (["\x1b[31mred"], "run was made with plugins, but records no module's name; it cannot be opened"),
        ([3, None, {"a": 1}], "run was made with plugins, but records no module's name"),
    ],
)
def test_what_a_checkpoint_records_and_is_not_loaded_is_told_and_never_imported(recorded, message, module):
    for name in ("a", "b"):
        module(name, "raise SystemExit('imported')")
    with pytest.raises(ValueError) as error:
        plugins.check(recorded, "run")
    assert message in str(error.value)
    assert str(error.value).isprintable() and len(str(error.value)) < 400


def test_what_is_loaded_satisfies_a_checkpoint(module):
    plugins.load([module("needed_plugin")])
    plugins.check(["needed_plugin"], "run")
    plugins.check([], "run")


def test_a_command_loads_plugins_before_its_main_runs_and_hides_the_options(module, capsys):
    module("seen_plugin", "print('imported')")

    def main(argv: list[str]) -> int:
        print(*argv)
        return 0

    assert cli.run_command(main, ["a", "--plugin", "seen_plugin", "--debug", "b"]) == 0
    assert capsys.readouterr().out == "imported\na b\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--plugin", "no_such_plugin"], "the plugin no_such_plugin is not there; install it"),
        (["--plugin"], "--plugin takes the name of a module"),
        (["--plugin", "taken_plugin"], "there is an encoder 'vision' already; choose another name"),
        (["--plugin", "untyped_plugin"], "the metric 'mine' is a str; register a MetricSpec"),
        (["--plugin", "class_plugin"], "the encoder 'mine' is the class EncoderSpec; register an EncoderSpec"),
    ],
)
def test_a_plugin_that_cannot_be_loaded_is_one_line_and_status_2(arguments, message, module, capsys):
    module("taken_plugin", "from megatron_gemini.registry import ENCODERS\n\nENCODERS.register('vision', None)\n")
    module("untyped_plugin", "from megatron_gemini.registry import METRICS\n\nMETRICS.register('mine', 'mine')\n")
    module(
        "class_plugin",
        "from megatron_gemini.modalities.spec import EncoderSpec\nfrom megatron_gemini.registry import ENCODERS\n\n"
        "ENCODERS.register('mine', EncoderSpec)\n",
    )
    assert cli.main(["train", *arguments]) == 2
    told = capsys.readouterr().err
    assert message in told and told.count("\n") == 1


PLUGIN = """
from dataclasses import dataclass

from megatron_gemini.config.encoders import ConnectorConfig
from megatron_gemini.connectors.spec import ConnectorSpec
from megatron_gemini.registry import CONNECTORS


@dataclass(frozen=True)
class MixerConfig(ConnectorConfig):
    kind: str = "mixer"
    heads: int = 4


CONNECTORS.register("mixer", ConnectorSpec("mixer", MixerConfig, None, None, None, None))
"""


@pytest.mark.parametrize("entry", ["megatron_gemini.cli train", "megatron_gemini.train", "megatron_gemini.cli plan"])
def test_every_entry_point_takes_plugins(entry, module, tmp_path):
    module("mixer_plugin", PLUGIN)
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    wrong = ["--encoders.vision.connector.kind", "mixer", "--encoders.vision.connector.hedas", "3"]
    command = [sys.executable, "-m", *entry.split(), "--plugin", "mixer_plugin", *wrong]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (result.returncode, result.stderr) == (
        2,
        "megatron-gemini: error: --encoders.vision.connector.hedas is no setting; did you mean "
        "--encoders.vision.connector.heads?\n",
    )


@pytest.mark.parametrize("entry", ["megatron_gemini.generate", "megatron_gemini.evaluate"])
def test_entry_points_that_open_a_checkpoint_take_plugins(entry):
    command = [sys.executable, "-m", entry, "--plugin", "no_such_plugin", "--checkpoint", "nowhere"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 2
    assert "the plugin no_such_plugin is not there" in result.stderr and result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "arguments", [["--help"], *([command, "--help"] for command in ("train", "plan", "generate", "evaluate"))]
)
def test_help_says_that_there_are_plugins(arguments):
    command = [sys.executable, "-m", "megatron_gemini.cli", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0 and "--plugin" in result.stdout


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("raise RuntimeError('boom')", "RuntimeError: boom"),
        ("{}['x']", "KeyError: 'x'"),
        ("def", "SyntaxError"),
        ("import sys; sys.exit(0)", "SystemExit: 0"),
        ("raise ValueError('it is taken')", "it is taken"),
    ],
)
def test_a_plugin_that_fails_while_it_is_imported_is_named_in_a_line(text, told, module, capsys):
    name = module("it_fails", text)
    assert cli.run_command(lambda argv: 0, ["--plugin", name]) == 2
    error = capsys.readouterr().err
    assert told in error and "the plugin it_fails" in error
    assert len(error.splitlines()) == 1
    assert plugins.loaded() == ()
