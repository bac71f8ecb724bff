"""The names in force are saved with a checkpoint and compared; none of them is ever imported."""

import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from megatron_gemini import plugins
from megatron_gemini.checkpoint.directory import step_directory, verify
from megatron_gemini.checkpoint.extensions import Extensions
from megatron_gemini.checkpoint.index import INDEX, seal
from megatron_gemini.checkpoint.inference import load_for_inference, load_image_tokenizer
from megatron_gemini.checkpoint.init_from import initialize
from megatron_gemini.checkpoint.load import load
from megatron_gemini.checkpoint.run_state import RunState
from megatron_gemini.checkpoint.save import save
from megatron_gemini.config.encoders import EncoderConfig
from megatron_gemini.config.init_from import InitFromConfig
from megatron_gemini.config.run import RunConfig
from megatron_gemini.contracts import TokenLayout
from megatron_gemini.modalities.spec import ModalitySpec
from megatron_gemini.modalities.text.tokenizer import TextTokenizer
from megatron_gemini.registry import ENCODERS, MODALITIES
from tests.tiny_checkpoint import CONFIG, write_checkpoint
from tests.unit.checkpoint.still_engine import StillEngine

FILE = "extensions.json"
PLANTED = "planted_module"


@pytest.fixture
def run(tmp_path) -> Path:
    write_checkpoint(tmp_path / "run", 1, seed=1)
    return tmp_path / "run"


def change(run: Path, name: str, edit: Callable[[dict], None]) -> None:
    """Change a JSON or YAML file of the checkpoint, as somebody who also seals it again."""
    directory = step_directory(run, 1)
    values = yaml.safe_load((directory / name).read_text())
    edit(values)
    (directory / name).write_text(json.dumps(values))
    (directory / "index.json").unlink()
    seal(directory)


def engine(config: RunConfig = CONFIG, *sections: InitFromConfig, text_pieces: int = 300) -> StillEngine:
    return StillEngine(dataclasses.replace(config, init_from=sections), TokenLayout(text_pieces, (("image", 12),)))


@pytest.fixture
def modality() -> Iterator[Callable[[str, str], None]]:
    """modality(name, token): registers one of the vision encoder."""
    made: list[str] = []

    def register(name: str, token: str) -> None:
        MODALITIES.register(name, ModalitySpec(name, encoder="vision", control=token))
        made.append(name)

    yield register
    for name in made:
        MODALITIES.unregister(name)


def test_what_is_recorded(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(plugins, "_loaded", ["some.plugin"])
    path = save(engine(), tmp_path, RunState(step=3), {}, keep=1)
    assert json.loads((path / FILE).read_text()) == {
        "plugins": ["some.plugin"],
        "objective": "pretrain",
        "connectors": {"vision": "linear", "audio": "linear"},
        "control_tokens": {
            "image": "image",
            "image_begin": "image_begin",
            "image_end": "image_end",
            "video": "video",
            "audio": "audio",
        },
    }
    assert Extensions.read(path) == Extensions.of(CONFIG)
    assert FILE in json.loads((path / "index.json").read_text())["files"]
    without = dataclasses.replace(
        CONFIG, encoders=CONFIG.encoders | {"audio": dataclasses.replace(CONFIG.encoders["audio"], enabled=False)}
    )
    assert "audio" not in Extensions.of(without).control_tokens  # another plugin may take what no row has


def test_a_missing_plugin_is_told_before_its_settings_are_unknown(run) -> None:
    """The settings of a plugin's encoder are in config.yaml, where they would be no setting."""
    change(run, FILE, lambda recorded: recorded["plugins"].append("series_plugin"))
    change(run, "config.yaml", lambda config: config["encoders"].update(series={"width": 3}))
    for attempt in (lambda: load_for_inference(run), lambda: load(engine(), step_directory(run, 1))):
        with pytest.raises(ValueError, match=r"made with the plugins series_plugin.*add --plugin series_plugin$"):
            attempt()


def test_a_control_token_of_another_modality_names_both(run, modality) -> None:
    change(run, FILE, lambda recorded: recorded["control_tokens"].update(series="reserved_0"))
    modality("thermal", "reserved_0")
    for attempt in (lambda: load_for_inference(run), lambda: load(engine(), step_directory(run, 1))):
        with pytest.raises(
            ValueError,
            match=r"reserved_0 stands for series, here for thermal; .* in their order: none",
        ):
            attempt()


def test_a_modality_with_another_control_token_names_both(run, modality) -> None:
    change(run, FILE, lambda recorded: recorded["control_tokens"].update(series="reserved_0"))
    modality("series", "reserved_1")
    with pytest.raises(ValueError, match=r"series has the control token reserved_0, here reserved_1"):
        load_for_inference(run)


def test_a_vocabulary_is_not_taken_from_where_its_tokens_mean_something_else(run, modality) -> None:
    change(run, FILE, lambda recorded: recorded["control_tokens"].update(series="reserved_0"))
    modality("thermal", "reserved_0")
    pieces = TextTokenizer(step_directory(run, 1) / "text.model").size
    with pytest.raises(ValueError, match=r"reserved_0 stands for series, here for thermal"):
        initialize(engine(CONFIG, InitFromConfig(str(run)), text_pieces=pieces))
    initialize(engine(CONFIG, InitFromConfig(str(run), "encoders"), text_pieces=pieces))


def test_a_run_does_not_go_on_with_another_objective_connector_or_encoder(run) -> None:
    audio = dataclasses.replace(CONFIG.encoders["audio"], enabled=False)
    cases: list[tuple[dict[str, object], RunConfig, str]] = [
        ({"objective": "other"}, CONFIG, r"objective\.kind other, which is pretrain now; .*by init_from"),
        ({"connectors": {"vision": "mlp", "audio": "linear"}}, CONFIG, r"vision\.connector\.kind mlp, which is linear"),
        (
            {"connectors": {"vision": "linear", "audio": "linear"}},
            dataclasses.replace(CONFIG, encoders=CONFIG.encoders | {"audio": audio}),
            r"with the encoder audio, encoders\.audio\.enabled is false now",
        ),
        ({"connectors": {"vision": "linear"}}, CONFIG, r"without the encoder audio, encoders\.audio\.enabled is true"),
    ]
    for recorded, config, message in cases:
        change(run, FILE, lambda values, recorded=recorded: values.update(recorded))
        with pytest.raises(ValueError, match=message):
            load(engine(config), step_directory(run, 1))
        change(run, FILE, lambda values: values.update(dataclasses.asdict(Extensions.of(CONFIG))))


def test_an_encoder_of_a_plugin_that_came_later_is_not_asked_for(run) -> None:
    ENCODERS.register("later", dataclasses.replace(ENCODERS.get("vision"), name="later", section=EncoderConfig))
    try:
        assert "later" not in load_for_inference(run).config.enabled_encoders
    finally:
        ENCODERS.unregister("later")


@pytest.mark.parametrize(
    "edit",
    [
        lambda recorded: recorded.pop("plugins"),
        lambda recorded: recorded.update(plugins=3),
        lambda recorded: recorded.update(plugins="evil"),
        lambda recorded: recorded.update(plugins=["fine", "x; rm -rf y"]),
        lambda recorded: recorded.update(objective=["pretrain"]),
        lambda recorded: recorded.update(connectors={"vision": 3}),
        lambda recorded: recorded.update(control_tokens={"a\nb": "image"}),
    ],
)
def test_a_file_of_something_else_is_named(run, edit) -> None:
    change(run, FILE, edit)
    with pytest.raises(ValueError, match=r"extensions\.json") as caught:
        load_for_inference(run)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [FILE, INDEX])
def test_a_file_that_is_nested_too_deeply_is_named(run, name) -> None:
    """Python's JSON parser recurses: a stranger's brackets would end in a traceback."""
    directory = step_directory(run, 1)
    (directory / name).write_text("[" * 200_000)
    with pytest.raises(ValueError, match=name.replace(".", r"\.")) as caught:
        if name == INDEX:
            verify(directory)
        else:
            Extensions.read(directory)
    assert "\n" not in str(caught.value)


def test_a_carried_image_tokenizer_is_checked_as_well(run) -> None:
    change(run, f"image_tokenizer/{FILE}", lambda recorded: recorded["plugins"].append("series_plugin"))
    with pytest.raises(ValueError, match=r"made with the plugins series_plugin"):
        load_image_tokenizer(run)


@pytest.fixture
def canary(tmp_path, monkeypatch) -> Iterator[Path]:
    """What a module called `PLANTED`, which can be imported, writes when it is."""
    folder = tmp_path / "path"
    folder.mkdir()
    (folder / f"{PLANTED}.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w').close()\n")
    monkeypatch.syspath_prepend(str(folder))
    yield tmp_path / "canary"
    assert PLANTED not in sys.modules


PLANT: dict[str, Callable[[Path], None]] = {
    "as a plugin": lambda run: change(run, FILE, lambda values: values["plugins"].append(PLANTED)),
    "as an objective": lambda run: change(run, FILE, lambda values: values.update(objective=PLANTED)),
    "as a connector": lambda run: change(run, FILE, lambda values: values["connectors"].update(vision=PLANTED)),
    "as a modality": lambda run: change(run, FILE, lambda values: values["control_tokens"].update({PLANTED: "image"})),
    "as an encoder's settings": lambda run: change(
        run, "config.yaml", lambda values: values["encoders"].update({PLANTED: {"width": 3}})
    ),
    "as an objective's kind": lambda run: change(
        run, "config.yaml", lambda values: values["objective"].update(kind=PLANTED)
    ),
    "as a connector's kind": lambda run: change(
        run, "config.yaml", lambda values: values["encoders"]["vision"]["connector"].update(kind=f"{PLANTED}:NAME")
    ),
    "as a section of plugins": lambda run: change(run, "config.yaml", lambda values: values.update(plugins=[PLANTED])),
}


@pytest.mark.parametrize("where", PLANT)
def test_a_module_that_a_checkpoint_names_is_not_imported(run, canary, where) -> None:
    PLANT[where](run)
    attempts: list[Callable[[], object]] = [
        lambda: load_for_inference(run),
        lambda: load(engine(), step_directory(run, 1)),
        lambda: initialize(engine(CONFIG, InitFromConfig(str(run), "decoder.layers"))),
        lambda: initialize(engine(CONFIG, InitFromConfig(str(run)))),
    ]
    for attempt in attempts:
        try:
            attempt()
        except ValueError as error:
            assert "\n" not in str(error)
        assert not canary.exists()


def test_the_planted_module_would_tell(canary) -> None:
    """So that the test before means something."""
    try:
        plugins.load([PLANTED])
        assert canary.exists()
    finally:
        plugins._loaded.remove(PLANTED)
        del sys.modules[PLANTED]
