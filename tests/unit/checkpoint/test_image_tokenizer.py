"""A trained tokenizer is found wherever a user points."""

from pathlib import Path

import pytest
import torch

from megatron_gemini.checkpoint import image_tokenizer
from megatron_gemini.checkpoint.image_tokenizer import image_tokenizer_path
from megatron_gemini.checkpoint.inference import WEIGHTS, load_image_tokenizer, save_weights
from megatron_gemini.config.load import dump_config
from megatron_gemini.config.model import ImageTokenizerConfig
from megatron_gemini.config.run import RunConfig
from megatron_gemini.modalities.image.code_tokenizer import ImageTokenizer
from megatron_gemini.parallel.parameters import initialize

CONFIG = RunConfig(
    image_tokenizer=ImageTokenizerConfig(image_size=8, width=16, layers=1, heads=2, mlp_width=16, codes=16)
)


@pytest.fixture
def tokenizer() -> ImageTokenizer:
    tokenizer = ImageTokenizer(CONFIG.image_tokenizer)
    initialize(tokenizer, seed=0)
    return tokenizer


def _checkpoint(run: Path) -> Path:
    step = run / "checkpoints" / "step-00000010"
    step.mkdir(parents=True)
    (step / "index.json").write_text("{}")
    (step / "config.yaml").write_text(dump_config(CONFIG))
    return step


def test_folder_of_weights_is_used_as_it_is(tokenizer, tmp_path):
    save_weights(tokenizer, CONFIG, tmp_path)
    assert image_tokenizer_path(tmp_path) == tmp_path


def test_tokenizer_within_a_models_checkpoint_is_found(tokenizer, tmp_path):
    step = _checkpoint(tmp_path)
    save_weights(tokenizer, CONFIG, step / "image_tokenizer")
    assert image_tokenizer_path(tmp_path) == step / "image_tokenizer"


def test_training_checkpoint_is_exported_once(tokenizer, tmp_path, monkeypatch):
    step = _checkpoint(tmp_path)
    loads = []
    monkeypatch.setattr(image_tokenizer, "load_image_tokenizer", lambda path: loads.append(path) or tokenizer)
    folder = image_tokenizer_path(tmp_path)
    assert image_tokenizer_path(step) == folder
    assert loads == [step]
    again = load_image_tokenizer(folder)
    images = torch.rand(2, 8, 8, 3) * 2 - 1
    assert torch.equal(again.encode(images), tokenizer.encode(images))
    assert sorted(path.name for path in step.parent.iterdir()) == ["step-00000010", "weights-step-00000010"]


def test_rank_that_comes_second_uses_what_the_first_wrote(tokenizer, tmp_path, monkeypatch):
    step = _checkpoint(tmp_path)
    folder = step.parent / "weights-step-00000010"

    def load_while_another_rank_finishes(path: Path) -> ImageTokenizer:
        save_weights(tokenizer, CONFIG, folder)
        return tokenizer

    monkeypatch.setattr(image_tokenizer, "load_image_tokenizer", load_while_another_rank_finishes)
    assert (image_tokenizer_path(tmp_path) / WEIGHTS).is_file()
    assert not list(step.parent.glob(".weights-*"))


def test_missing_tokenizer_is_named(tmp_path):
    with pytest.raises(ValueError, match="gone"):
        image_tokenizer_path(tmp_path / "gone")
    with pytest.raises(ValueError, match="no complete checkpoint"):
        image_tokenizer_path(tmp_path)
