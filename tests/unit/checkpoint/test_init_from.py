"""A run begins with weights of another checkpoint, and what is said when they do not fit."""

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch

from megatron_gemini.checkpoint import init_from
from megatron_gemini.checkpoint.directory import step_directory
from megatron_gemini.checkpoint.inference import save_weights
from megatron_gemini.checkpoint.init_from import initialize
from megatron_gemini.checkpoint.pieces import PieceReader
from megatron_gemini.config.init_from import InitFromConfig
from megatron_gemini.config.run import RunConfig
from megatron_gemini.contracts import TokenLayout
from megatron_gemini.modalities.text.tokenizer import TextTokenizer
from tests.tiny_checkpoint import CONFIG, train_text_model, write_checkpoint
from tests.unit.checkpoint.still_engine import StillEngine


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    write_checkpoint(folder, 1, seed=7)
    return folder


def text_model(run: Path) -> str:
    return str(step_directory(run, 1) / "text.model")


def engine(run: Path, *sections: InitFromConfig, text_pieces: int | None = None, **changes) -> StillEngine:
    """Of another seed than the checkpoint's. changes: settings of `model`."""
    config = dataclasses.replace(
        CONFIG,
        model=dataclasses.replace(CONFIG.model, **changes),
        data=dataclasses.replace(CONFIG.data, text_model=text_model(run)),
        init_from=sections,
    )
    return of_config(config, text_pieces or TextTokenizer(text_model(run)).size)


def of_config(config: RunConfig, text_pieces: int) -> StillEngine:
    return StillEngine(config, TokenLayout(text_pieces, (("image", config.image_tokenizer.codes),)))


def of(run: Path, module: str = ".", **settings) -> InitFromConfig:
    return InitFromConfig(checkpoint=str(run), module=module, **settings)


def saved(run: Path, name: str) -> torch.Tensor:
    return PieceReader(step_directory(run, 1)).weight(name)


@pytest.mark.parametrize("module", [".", "decoder", "encoders.vision", "connectors", "connectors.audio.projection"])
def test_the_module_is_filled_and_nothing_else(run, module) -> None:
    model = engine(run, of(run, module))
    before = model.weights()
    (line,) = initialize(model)
    filled = [name for name in before if module == "." or name.startswith(f"{module}.")]
    assert filled
    for name, weight in model.weights().items():
        assert torch.equal(weight, saved(run, name) if name in filled else before[name]), name
    elements = sum(before[name].numel() for name in filled)
    what = "the model" if module == "." else module
    assert line == f"initialized {what} ({elements:,} parameters) from {step_directory(run, 1)}"


def test_an_encoder_goes_to_a_decoder_of_another_width(run) -> None:
    model = engine(run, of(run, "encoders.vision"), width=48)
    initialize(model)
    weights = model.weights()
    for name in weights:
        if name.startswith("encoders.vision."):
            assert torch.equal(weights[name], saved(run, name))


def test_sections_are_taken_in_order_and_only_what_is_asked_for_is_read(run, monkeypatch) -> None:
    read = []
    original = PieceReader.read
    monkeypatch.setattr(PieceReader, "read", lambda self, kind, name: read.append(name) or original(self, kind, name))
    lines = initialize(engine(run, of(run, "encoders.audio"), of(run, "connectors.audio")))
    assert [line.split()[1] for line in lines] == ["encoders.audio", "connectors.audio"]
    assert read and all(name.split(".")[1] == "audio" for name in read)


def test_weights_in_one_file_do_as_well(run, tmp_path) -> None:
    model = engine(run, InitFromConfig(checkpoint=str(tmp_path), module="encoders.vision", source="."))
    other = of_config(dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, seed=3)), 300)
    vision = other.frozen[0].module.get_submodule("encoders.vision")
    save_weights(vision, CONFIG, tmp_path)
    initialize(model)
    for name, parameter in vision.named_parameters():
        assert torch.equal(model.weights()[f"encoders.vision.{name}"], parameter)


def test_names_are_mapped(run) -> None:
    section = of(run, "connectors.vision", source="connectors.audio", rename=("projection.bias=projection.bias",))
    model = engine(run, section)
    initialize(model)
    for name in ("weight", "bias"):
        assert torch.equal(
            model.weights()[f"connectors.vision.projection.{name}"], saved(run, f"connectors.audio.projection.{name}")
        )


def refused(model: StillEngine) -> str:
    """The one line of the error; nothing was changed."""
    before = model.weights()
    with pytest.raises(ValueError) as caught:
        initialize(model)
    assert all(torch.equal(weight, before[name]) for name, weight in model.weights().items())
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_missing_and_unexpected_names_are_listed_with_their_number(run) -> None:
    said = refused(engine(run, of(run, "decoder", rename=("layers.0.attention=layers.0.mixer",)), layers=2))
    assert said.startswith(f"init_from.0 ({step_directory(run, 1)}): the checkpoint lacks decoder.layers.0.attention.")
    assert "the model has no place for decoder.layers.0.attention." in said
    assert said.count("decoder.layers.") == 6 and " more (" in said


def test_shapes_that_differ_are_listed(run) -> None:
    said = refused(engine(run, of(run, "decoder.layers"), mlp_width=96))
    assert "other shapes: decoder.layers.0.mlp.down is (32, 64) there and (32, 96) here, " in said
    assert "text model" not in said  # which only the rows of the vocabulary depend on


def test_a_checkpoint_that_is_not_there_is_told_with_its_setting(run, tmp_path) -> None:
    sections = [of(run, "encoders"), InitFromConfig(str(tmp_path / "gone"), "decoder")]
    assert refused(engine(run, *sections)) == f"init_from.1.checkpoint: checkpoint {tmp_path / 'gone'} does not exist"


def test_a_vocabulary_of_another_size_is_told_as_such(run) -> None:
    said = refused(engine(run, of(run), text_pieces=290))
    assert "decoder.embedding.weight is (" in said and "the text model, or the number of codes, is another one" in said


def test_a_vocabulary_of_another_text_model_of_the_same_size_is_refused(run, tmp_path) -> None:
    train_text_model(tmp_path / "text.model")
    (tmp_path / "text.model").write_bytes(Path(text_model(run)).read_bytes() + b"\0")
    for module, refuses in (("decoder", True), ("encoders", False)):
        model = engine(run, of(run, module))
        data = dataclasses.replace(model.config.data, text_model=str(tmp_path / "text.model"))
        model.config = dataclasses.replace(model.config, data=data)
        if refuses:
            assert "its vocabulary is not that of data.text_model" in refused(model)
        else:
            initialize(model)


def test_what_is_allowed_to_be_missing_keeps_its_initial_values(run) -> None:
    model = engine(run, of(run, "decoder", allow_missing=("layers.1",)), layers=2)
    before = model.weights()
    initialize(model)
    for name, weight in model.weights().items():
        stays = name.startswith("decoder.layers.1.") or not name.startswith("decoder.")
        assert torch.equal(weight, before[name] if stays else saved(run, name)), name


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ("encoders.visoin", "module is encoders.visoin, and the model has no parameter below it; there are"),
        ("encoders.vision.blocks.9", "module is encoders.vision.blocks.9"),
    ],
)
def test_a_module_that_is_not_there_is_named(run, module, message) -> None:
    assert message in refused(engine(run, of(run, module)))


def test_a_checkpoint_that_is_not_there_or_is_damaged_is_named(run, tmp_path) -> None:
    assert "nowhere does not exist" in refused(engine(run, of(tmp_path / "nowhere")))
    damaged = shutil.copytree(run, tmp_path / "run")
    path = step_directory(damaged, 1) / "rank-00000.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    said = refused(engine(run, of(damaged, "encoders.vision")))
    assert "rank-00000.safetensors is not what was saved" in said


def test_a_run_without_the_section_is_left_alone(run) -> None:
    model = engine(run)
    before = model.weights()
    assert initialize(model) == []
    assert all(torch.equal(weight, before[name]) for name, weight in model.weights().items())


def test_all_ranks_take_the_checkpoint_that_rank_0_found(run, tmp_path) -> None:
    """A run that goes on at the source may have another newest one by the time that a rank looks."""
    found = shutil.copytree(step_directory(run, 1), tmp_path / "step-00000009")
    model = engine(run, of(run, "encoders.vision"))
    model.topology = dataclasses.replace(model.topology, rank=1)
    model.gather = lambda value: [[found]] if value == [] else [value]
    (line,) = initialize(model)
    assert line.endswith(f"from {found}")


def test_a_checkpoint_that_is_rotated_away_meanwhile_is_not_called_damaged(run, tmp_path, monkeypatch) -> None:
    source = shutil.copytree(run, tmp_path / "run")
    monkeypatch.setattr(
        init_from, "_fill", lambda *_: shutil.rmtree(step_directory(source, 1))
    )  # as the run there would
    with pytest.raises(ValueError, match="was deleted or replaced while it was read"):
        initialize(engine(source, of(source, "encoders.vision")))
