"""The sample sheet is drawn from whatever there is."""

import warnings

import numpy as np
import PIL.Image
import pytest

from megatron_gemini.evaluation.section import Answer
from megatron_gemini.evaluation.sections import Captions, Clips, DrawnFromSpeech, DrawnFromText, Rebuilt, Transcripts
from megatron_gemini.evaluation.sheet import Sheet

NOISE = np.random.default_rng(0)
IMAGE = NOISE.integers(0, 255, (16, 24, 3), dtype=np.uint8)
MEL = NOISE.normal(size=(60, 32)).astype(np.float32)
SECTIONS = [
    DrawnFromText(
        [("draw", [IMAGE] * 3), ("a longer prompt than there is room for in the margin of a row", [IMAGE] * 2)]
    ),
    Captions([(IMAGE, Answer("a cat", "a  cat")), (IMAGE, Answer("", "dog"))]),
    Transcripts([(MEL, Answer("costs $5 or $6_", "x"))]),
    Clips([(np.stack([IMAGE] * 9), Answer("one", "one"))]),
    DrawnFromSpeech([(MEL, "seven", IMAGE)]),
    Rebuilt([(IMAGE, IMAGE)] * 40),
]


def height(sheet: Sheet, path) -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a missing glyph is a box on the sheet
        sheet.save(path)
    image = PIL.Image.open(path)
    assert image.width == 1600
    return image.height


def test_every_section_is_drawn(tmp_path) -> None:
    rows = [SECTIONS[:2], SECTIONS[2:3], SECTIONS[3:5], SECTIONS[5:]]
    assert height(Sheet("title", "subtitle", rows), tmp_path / "sheet.png") > 1000


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: type(section).__name__)
def test_a_section_alone_takes_room_and_an_empty_one_none(section, tmp_path) -> None:
    empty = type(section)([])
    alone = height(Sheet("title", "", [[section, empty], [empty]]), tmp_path / "a.png")
    assert alone > height(Sheet("title", "", [[empty]]), tmp_path / "b.png") + 80


def test_an_answer_is_right_whatever_its_spaces() -> None:
    assert Answer(" a  cat ", "a cat").correct
    assert not Answer("a cat", "a dog").correct


def test_constant_spectrograms_are_drawn(tmp_path) -> None:
    height(Sheet("title", "", [[Transcripts([(MEL * 0, Answer("a", "a"))])]]), tmp_path / "a.png")
