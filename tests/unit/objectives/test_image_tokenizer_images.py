"""A few images that cannot be read never end the training of the image tokenizer."""

import io
import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_gemini.config.data import DataConfig, SourceConfig
from megatron_gemini.config.model import ImageTokenizerConfig
from megatron_gemini.config.run import RunConfig
from megatron_gemini.config.schema import Plain
from megatron_gemini.objectives.image_tokenizer.images import ImageLoader
from tests.end_to_end.dataset import write_tar


def loader(path: Path, bad: int) -> ImageLoader:
    """Over 20 images, of which the first `bad` are none, 20 a step."""
    file = io.BytesIO()
    Image.fromarray(np.full((8, 8), 99, np.uint8)).save(file, "PNG")
    content = {f"{number:02}": {"png": b"no image" if number < bad else file.getvalue()} for number in range(20)}
    write_tar(path / "images.tar", content)
    return ImageLoader(
        RunConfig(
            image_tokenizer=ImageTokenizerConfig(image_size=8, patch=4),
            data=DataConfig(sources=(SourceConfig(str(path / "images.tar")),), max_bad_share=0.1),
        ),
        20,
        0,
        1,
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
