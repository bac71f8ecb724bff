"""Loading a checkpoint for inference, and what is said when it cannot be."""

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from megatron_gemini.checkpoint.directory import step_directory
from megatron_gemini.checkpoint.extensions import Extensions
from megatron_gemini.checkpoint.index import seal
from megatron_gemini.checkpoint.inference import load_for_inference, load_image_tokenizer, save_weights
from megatron_gemini.config.load import dump_config
from megatron_gemini.contracts import TokenLayout
from megatron_gemini.modalities.image.code_tokenizer import ImageTokenizer
from megatron_gemini.models.gemini import Gemini
from megatron_gemini.parallel.parameters import initialize
from tests.tiny_checkpoint import CONFIG, write_checkpoint, write_pieces


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, list[Gemini]]:
    run = tmp_path_factory.mktemp("run")
    return run, [write_checkpoint(run, step, seed=step) for step in (1, 2)]


@pytest.fixture
def run(made, tmp_path) -> Path:
    """A copy to damage."""
    return shutil.copytree(made[0], tmp_path / "run")


def same(module: nn.Module, other: nn.Module) -> bool:
    ours, theirs = dict(module.named_parameters()), dict(other.named_parameters())
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def reseal(directory: Path) -> None:
    (directory / "index.json").unlink()
    seal(directory)


def test_a_run_gives_its_newest_model_and_a_step_its_own(made) -> None:
    run, models = made
    assert same(load_for_inference(run).model, models[1])
    assert same(load_for_inference(str(step_directory(run, 1))).model, models[0])


def test_everything_that_answers_is_loaded(made) -> None:
    loaded = load_for_inference(made[0])
    assert loaded.config == CONFIG
    assert loaded.layout == TokenLayout(loaded.text_tokenizer.size, (("image", 12),))
    assert not loaded.model.training
    tokenizer = ImageTokenizer(CONFIG.image_tokenizer)
    initialize(tokenizer, 2)
    assert loaded.image_tokenizer is not None and same(loaded.image_tokenizer, tokenizer)


@pytest.mark.parametrize("latest", [None, "", "step-00000009\n", "../../elsewhere"])
def test_a_broken_latest_falls_back_to_the_newest_complete_step(run, made, latest) -> None:
    pointer = run / "checkpoints" / "latest"
    pointer.unlink() if latest is None else pointer.write_text(latest)
    step_directory(run, 3).mkdir()  # as a killed save would leave it
    assert same(load_for_inference(run).model, made[1][1])


def test_a_missing_or_empty_directory_is_named(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"nowhere does not exist"):
        load_for_inference(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds no complete checkpoint"):
        load_for_inference(tmp_path)


@pytest.mark.parametrize(
    "name", ["rank-00000.safetensors", "rank-00000.json", "config.yaml", "text.model", "extensions.json"]
)
def test_a_changed_byte_is_found_and_the_file_named(run, name) -> None:
    path = step_directory(run, 2) / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        load_for_inference(run)


def test_a_missing_file_is_named(run) -> None:
    (step_directory(run, 2) / "text.model").unlink()
    with pytest.raises(ValueError, match=r"text\.model is missing"):
        load_for_inference(run)


def test_a_model_of_another_shape_names_the_parameter_and_both_shapes(run) -> None:
    directory = step_directory(run, 2)
    other = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, mlp_width=96))
    (directory / "config.yaml").write_text(dump_config(other))
    reseal(directory)
    with pytest.raises(ValueError, match=r"mlp\.\w+ is \(.*64.*\) in the checkpoint and \(.*96.*\) in the model"):
        load_for_inference(run)


def test_a_model_of_other_parameters_names_some_and_counts_the_rest(run) -> None:
    directory = step_directory(run, 2)
    other = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, layers=3))
    (directory / "config.yaml").write_text(dump_config(other))
    reseal(directory)
    with pytest.raises(ValueError, match=r"decoder\.layers\.1\.\S+ is not in the checkpoint; .*; and \d+ more"):
        load_for_inference(run)


def test_an_image_tokenizer_loads_from_its_own_run(tmp_path) -> None:
    tokenizer = ImageTokenizer(CONFIG.image_tokenizer)
    initialize(tokenizer, 5)
    directory = step_directory(tmp_path, 7)
    directory.mkdir(parents=True)
    write_pieces(tokenizer, directory)
    (directory / "config.yaml").write_text(dump_config(CONFIG))
    Extensions.of(CONFIG).write(directory)
    seal(directory)
    assert same(load_image_tokenizer(tmp_path), tokenizer)


def test_a_damaged_image_tokenizer_is_named(tmp_path) -> None:
    save_weights(ImageTokenizer(CONFIG.image_tokenizer), CONFIG, tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        load_image_tokenizer(tmp_path)
