"""A few images that cannot be read never end the training of the image tokenizer."""

import dataclasses
import io
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_gemini.config.data import DataConfig, SourceConfig
from megatron_gemini.config.model import ImageTokenizerConfig
from megatron_gemini.config.run import RunConfig
from megatron_gemini.config.schema import Plain
from megatron_gemini.objectives.image_tokenizer.images import ImageLoader
from tests.end_to_end.dataset import write_tar


def png(grey: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((8, 8), grey, np.uint8)).save(file, "PNG")
    return file.getvalue()


def loader(path: Path, bad: int, step: int = 20, rank: int = 0, ranks: int = 1) -> ImageLoader:
    """Over 20 images of different greys, of which the first `bad` are none."""
    content = {f"{number:02}": {"png": b"no image" if number < bad else png(10 * number)} for number in range(20)}
    write_tar(path / "images.tar", content)
    return ImageLoader(
        RunConfig(
            image_tokenizer=ImageTokenizerConfig(image_size=8, patch=4),
            data=DataConfig(sources=(SourceConfig(str(path / "images.tar")),), max_bad_share=0.1),
        ),
        step,
        rank,
        ranks,
    )


def test_the_same_bad_image_of_every_epoch_is_not_judged_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    images = loader(tmp_path, bad=2)
    with caplog.at_level(logging.WARNING):
        batches = [images.next() for _ in range(5)]
    assert all(batch.shape == (20, 8, 8, 3) for batch in batches)
    assert images.skipped.total() == 10
    assert len(caplog.messages) == 1


def test_other_images_in_the_place_of_those_of_a_checkpoint_are_refused(tmp_path: Path) -> None:
    state = loader(tmp_path, bad=1).state()
    loader(tmp_path, bad=1).load_state(state)
    with pytest.raises(ValueError, match=r"the images of data\.sources have changed .*--train\.no_resume"):
        loader(tmp_path, bad=2).load_state(state)


@pytest.mark.parametrize("images", [None, 3, {}, {"step": "1"}, {"step": -1}, {"step": True}])
def test_a_crafted_state_is_refused(tmp_path: Path, images: Plain) -> None:
    one = loader(tmp_path, bad=1)
    with pytest.raises(ValueError, match="the checkpoint is damaged"):
        one.load_state({**one.state(), "images": images})


def test_more_than_the_share_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"3 images cannot be read.*more than data.max_bad_share"):
        loader(tmp_path, bad=3).next()


def test_the_images_of_a_step_are_the_same_on_any_number_of_ranks_also_around_bad_ones(tmp_path: Path) -> None:
    whole = loader(tmp_path, bad=2, step=4)
    expected = [whole.next() for _ in range(10)]
    for ranks in (2, 4):  # on 4, a rank has one image of a step
        shares = [loader(tmp_path, bad=2, step=4, rank=rank, ranks=ranks) for rank in range(ranks)]
        assert all(torch.equal(torch.cat([share.next() for share in shares]), step) for step in expected)
        assert sum(share.skipped.total() for share in shares) == whole.skipped.total() == 4


def test_shards_without_one_good_image_are_an_error_that_says_why(tmp_path: Path) -> None:
    write_tar(tmp_path / "one.tar", {"0": {"png": b"no image"}})
    images = loader(tmp_path, bad=0)
    config = dataclasses.replace(images.config.data, sources=(SourceConfig(str(tmp_path / "one.tar")),))
    with pytest.raises(ValueError, match=r"none of the 1 images can be read: \{'"):
        ImageLoader(dataclasses.replace(images.config, data=config), 1, 0, 1).next()
