"""What the sheet shows is what the model got."""

import numpy as np

from megatron_gemini.config.encoders import VisionConfig
from megatron_gemini.data.samples.document import prepare
from megatron_gemini.evaluation.sheet import pixels, subtitle
from megatron_gemini.evaluation.validation import some
from megatron_gemini.modalities.image.item import Image
from megatron_gemini.modalities.video.item import Video

NOISE = np.random.default_rng(0).integers(0, 255, (3, 8, 12, 3), dtype=np.uint8)
ENCODERS = {"vision": VisionConfig(patch=4, max_side=16)}


def test_images_and_clips_are_shown_pixel_by_pixel() -> None:
    assert np.array_equal(pixels(prepare(Image(NOISE[0]), ENCODERS), ENCODERS), NOISE[:1])
    assert np.array_equal(pixels(prepare(Video(NOISE, 0.5), ENCODERS), ENCODERS), NOISE)


def test_the_subtitle_names_only_what_was_measured() -> None:
    report = {"caption_exact_match": 0.976, "transcribe_exact_match": None, "caption_cer": 0.1, "train_seconds": 372.4}
    assert subtitle(report) == "caption exact match 98%  ·  trained in 6 min 12 s  ·  all on validation data"
    assert subtitle(report, {"caption_cer": "wrong letters"}).startswith("wrong letters 10%  ·  trained in")
    assert subtitle({}) == ""


def test_some_are_spread_over_all() -> None:
    assert some(list("abcdefg"), 3) == ["a", "d", "g"]
