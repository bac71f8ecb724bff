"""Figures of drawn images with known answers: the judge sees codes and images that were made for it."""

import numpy as np
import pytest

from megatron_gemini.contracts import TokenLayout
from megatron_gemini.data.samples.items import Text
from megatron_gemini.evaluation.answers import accuracy
from megatron_gemini.evaluation.drawings import (
    Drawn,
    balanced,
    judge_drawings,
    judge_tokenizer,
    like_for_like,
)
from megatron_gemini.evaluation.images import Classifier
from megatron_gemini.evaluation.validation import Example, RealImages, spaced
from megatron_gemini.generation.api import Drawing, Generator


class Tokens(Generator):
    """An image is its grey value; its code is that value."""

    def __init__(self) -> None:
        self.layout = TokenLayout(5, (("image", 256),))

    def codes(self, images, batch_size=1):
        return [(int(image[0, 0, 0]),) for image in images]

    def pixels(self, codes, batch_size=1):
        return [grey(code) for (code,) in codes]


def grey(value: int) -> np.ndarray:
    return np.full((8, 8, 3), value, np.uint8)


def example(label: str) -> Example:
    return Example(label, [Text(label)], None, label, label)


REAL = RealImages([grey(v) for v in (0, 10, 20, 200, 210, 220)], ["dark"] * 3 + ["light"] * 3, [False] * 6)
VALIDATION = RealImages([grey(v) for v in (5, 10, 205, 215)], ["dark", "dark", "light", "light"], [False] * 4)
CLASSIFIER = Classifier(REAL.images, REAL.labels)


def drawn(*pairs: tuple[str, int | None]) -> Drawn:
    drawings = [None if value is None else Drawing((value,), grey(value)) for _, value in pairs]
    return Drawn([example(label) for label, _ in pairs], drawings)


def test_recognized_counts_wrong_and_missing_images() -> None:
    assert drawn(("dark", 3), ("light", 230), ("light", 4), ("dark", None)).recognized(CLASSIFIER) == 0.5


def test_copies_and_diversity_are_of_the_drawn_images() -> None:
    figures = judge_drawings(Tokens(), drawn(("dark", 3), ("dark", 10)), CLASSIFIER, REAL, VALIDATION)
    assert figures["image_copied"] == 0.5
    assert figures["image_copied_validation"] == 0.25
    assert figures["image_diversity"] == pytest.approx(7 / 5)
    assert figures["image_recognized"] == 1.0


def test_tokenizer_figures() -> None:
    figures, rebuilt = judge_tokenizer(Tokens(), CLASSIFIER, REAL, VALIDATION)
    assert figures == {"code_usage": 6 / 256, "reconstruction_recognized": 1.0, "reconstruction_psnr": 99.0}
    assert all(map(np.array_equal, rebuilt, VALIDATION.images))


def test_every_class_is_asked_equally_often() -> None:
    examples = [example(label) for label in ("a", "b", "a", "c")]
    asked = [e.label for e in balanced(examples, ["a", "b", "z"], 10)]
    assert sorted(asked) == ["a"] * 5 + ["b"] * 5


def test_real_images_are_compared_like_for_like() -> None:
    chosen = like_for_like(VALIDATION, ["dark", "light", "dark", "dark"])
    assert chosen.labels == ["dark", "dark", "light"]


def test_accuracy_ignores_case_spaces_and_a_closing_mark() -> None:
    assert accuracy([("One  two.", "one two"), ("one", "two"), ("", "one"), ("one two", "one two")]) == 0.5


def test_samples_are_spread_over_all() -> None:
    assert list(spaced(10, 4)) == [0, 3, 6, 9]
    assert list(spaced(3, 10)) == [0, 1, 2]
    assert list(spaced(0, 10)) == []
