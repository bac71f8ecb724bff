"""What documents say of the code is so: examples, links, paths, settings and YAML."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from megatron_gemini.config.load import load_config
from megatron_gemini.config.run import RunConfig
from megatron_gemini.config.schema import Chosen, Kind, Section, below, names_below
from megatron_gemini.models.presets import preset

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
EXTENDING = ROOT / "docs/extending.md"
PLUGIN = ROOT / "tests/extension/plugin.py"
TOP = ("docs", "examples", "megatron_gemini", "tests", "tools")
SUFFIX = r"\.(?:py|sh|yaml|json|md|png|slurm|txt|toml)"
FENCE = re.compile(r"```(\w*)\n(.*?)\n```", re.S)
EXAMPLE = re.compile(r"`([^`\n]+)`:\n\n```python\n(.*?)\n```", re.S)


def ids(path: Path) -> str:
    return str(path.relative_to(ROOT))


def without_fences(text: str) -> str:
    return FENCE.sub("", text)


def code_of(text: str) -> list[str]:
    """What stands as code in a document: in fences, in backquotes, and in lines that are indented by four."""
    rest = without_fences(text)
    fences = [code for _, code in FENCE.findall(text)]
    return [*fences, *re.findall(r"`([^`]+)`", rest), *re.findall(r"^    (.*)$", rest, re.M)]


def links(text: str) -> Iterator[tuple[str, str]]:
    """(file, heading) of every link that is no address; either may be empty."""
    for target in re.findall(r"\]\(([^)\s]+)\)", without_fences(text)):
        if "://" not in target:
            file, _, heading = target.partition("#")
            yield file, heading


def anchors(text: str) -> set[str]:
    """What a link to a heading of the document says after its #, as GitHub makes it."""
    titles = re.findall(r"^#+ (.*)$", without_fences(text), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_every_example_of_extending_is_in_the_file_that_it_names():
    text = EXTENDING.read_text()
    found = EXAMPLE.findall(text)
    assert len(found) == text.count("```python"), "an example has no file's name in the line above it"
    for name, example in found:
        assert example in (ROOT / name).read_text(), f"{name} no longer has what docs/extending.md shows of it"


def test_the_first_example_of_a_file_runs_as_it_is_shown():
    """Names behind TYPE_CHECKING stand in annotations, which Python 3.11 evaluates without this line."""
    first = dict(reversed(EXAMPLE.findall(EXTENDING.read_text())))
    assert {name for name, example in first.items() if "from __future__ import annotations" not in example} == set()


def test_extending_shows_every_file_that_the_plugin_registers_from():
    shown = {name for name, _ in EXAMPLE.findall(EXTENDING.read_text())}
    tree = ast.parse(PLUGIN.read_text())
    modules = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    own = {f"{module.replace('.', '/')}.py" for module in modules if module.startswith("tests.extension.")}
    assert own <= shown


@pytest.mark.parametrize("path", DOCUMENTS, ids=ids)
def test_links_lead_to_files_and_headings(path):
    for file, heading in links(path.read_text()):
        target = (path.parent / file).resolve() if file else path
        assert target.exists(), f"{ids(path)} links to {file}"
        if heading:
            assert heading in anchors(target.read_text()), f"{ids(path)} links to {file}#{heading}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=ids)
def test_paths_exist(path):
    """Those that begin with a folder of the project or of the package, without a pattern in them."""
    for code in code_of(path.read_text()):
        for name in re.findall(rf"(?<![\w./*{{-])(?:[\w.-]+/)+(?:[\w.-]+{SUFFIX}\b)?(?![\w*{{./])", code):
            first = name.partition("/")[0]
            # `data/` is also what a folder of a user's is called in examples.
            ours = first in TOP or ((ROOT / "megatron_gemini" / first).is_dir() and not re.fullmatch(r"data/", name))
            if ours:
                found = any((base / name).exists() for base in (ROOT, ROOT / "megatron_gemini"))
                assert found, f"{ids(path)} speaks of {name}"


def test_the_map_of_the_code_is_complete():
    readme = (ROOT / "README.md").read_text()
    section = readme[readme.index("## A map of the code") :]
    lines = re.findall(r"^    (  )?([\w./]+)(?:  .*)?$", section[: section.index("\n\n|")], re.M)
    folder, found = "", set()
    for inside, name in lines:
        folder = folder if inside else name
        place = ROOT / (folder + name if inside else name)
        assert place.exists(), ids(place)
        found.add(place)
    packages = {each.parent for each in (ROOT / "megatron_gemini").glob("*/__init__.py")}
    assert packages <= found


def setting_exists(name: str) -> bool:
    """Whether a dotted name leads to a setting or a section; NAME stands for what the user chooses."""
    found: list[Kind] = [Section(RunConfig)]
    for part in name.split("."):
        inner = [below(kind, names_below(kind)[0] if part == "NAME" and names_below(kind) else part) for kind in found]
        # Where a section's `kind` decides, the settings of all its kinds exist.
        choices = [kind.registry.names if isinstance(kind, Chosen) else [""] for kind in inner]
        pairs = [(kind, choice) for kind, names in zip(inner, choices, strict=True) for choice in names]
        found = [Section(kind.of(choice)) if isinstance(kind, Chosen) else kind for kind, choice in pairs if kind]
    return bool(found)


def unknown_settings(text: str) -> list[str]:
    """Every --section.field, and every section.field in backquotes, that is no setting though its section is one."""
    named = [name for code in code_of(text) for name in re.findall(r"(?<!\S)--([a-z_]+(?:\.\w+)+)", code)]
    quoted = [
        re.fullmatch(r"([a-z_]+(?:\.\w+)+)(?:: .*)?", code) for code in re.findall(r"`([^`]+)`", without_fences(text))
    ]
    named += [match[1] for match in quoted if match and not re.search(rf"{SUFFIX}$", match[1])]
    sections = names_below(Section(RunConfig))
    return [name for name in named if name.split(".")[0] in sections and not setting_exists(name)]


def wrong_yaml(text: str, folder: Path) -> list[str]:
    """What is wrong with the settings in the YAML of a document: of a run, of a source, or a list of sources."""
    problems = []
    for language, code in FENCE.findall(text):
        if language != "yaml":
            continue
        read = yaml.safe_load(code)
        if not isinstance(read, dict) or not set(read) <= {*names_below(Section(RunConfig)), "preset"}:
            sources = read if isinstance(read, list) else [read]
            read = {"data": {"sources": [{"shards": "x.tar", **source} for source in sources]}}
        file = folder / "run.yaml"
        file.write_text(yaml.safe_dump(read))
        try:
            load_config(["--config", str(file)], presets=preset)
        except ValueError as error:
            problems.append(str(error))
    return problems


@pytest.mark.parametrize("path", [path for path in DOCUMENTS if path != EXTENDING], ids=ids)
def test_settings_exist(path, tmp_path):
    text = path.read_text()
    assert unknown_settings(text) + wrong_yaml(text, tmp_path) == []


def test_settings_of_the_extension_exist(tmp_path):
    """In a process of its own, since a plugin stays loaded."""
    code = (
        "import pathlib, tests.extension.plugin\n"
        "from tests.unit.test_documents import EXTENDING, unknown_settings, wrong_yaml\n"
        "text = EXTENDING.read_text()\n"
        f"found = unknown_settings(text) + wrong_yaml(text, pathlib.Path({str(tmp_path)!r}))\n"
        "assert not found, found\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True)
