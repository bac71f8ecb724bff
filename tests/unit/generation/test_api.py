"""Answers as texts and pictures."""

import numpy as np
import pytest

from megatron_gemini.checkpoint.inference import load_for_inference
from megatron_gemini.contracts import TokenLayout
from megatron_gemini.data.samples.items import Text
from megatron_gemini.generation.api import Answer, Drawing, Generator, split_answer
from megatron_gemini.generation.settings import SampleSettings
from megatron_gemini.modalities.image.item import Image
from tests.tiny_checkpoint import CONFIG, write_checkpoint

IMAGE = SampleSettings(answer="image", max_tokens=CONFIG.image_tokenizer.codes_per_image + 3)


@pytest.fixture(scope="module")
def generator(tmp_path_factory) -> Generator:
    run = tmp_path_factory.mktemp("run")
    write_checkpoint(run, 1, seed=1)
    return Generator(load_for_inference(run))


def test_an_answer_splits_into_texts_and_images_in_order() -> None:
    layout = TokenLayout(10, (("image", 6),))
    begin, end, code = layout.control("image_begin"), layout.control("image_end"), layout.code_range("image").start
    answer = [begin, code + 5, code, end, 3, 4, begin, code + 1, code + 2, end]
    assert split_answer(layout, answer) == [(5, 0), [3, 4], (1, 2)]
    assert split_answer(layout, []) == []


def test_a_drawing_is_its_codes_decoded(generator: Generator) -> None:
    (drawing,) = generator.respond([Text("draw two")], IMAGE)
    assert isinstance(drawing, Drawing)
    assert len(drawing.codes) == CONFIG.image_tokenizer.codes_per_image
    assert drawing.pixels_HW3.shape == (8, 8, 3) and drawing.pixels_HW3.dtype == np.uint8
    assert np.array_equal(drawing.pixels_HW3, generator.pixels([drawing.codes])[0])


def test_text_answers_are_decoded_text(generator: Generator) -> None:
    pixels = np.zeros((20, 20, 3), np.uint8)
    settings = SampleSettings(answer="text", max_tokens=8, temperature=2.0)
    answers = generator.respond_all([[Image(pixels), Text("what is this")]] * 3, settings)
    assert any(answers) and all(isinstance(piece, str) for answer in answers for piece in answer)


def test_the_size_of_a_batch_changes_no_answer(generator: Generator) -> None:
    prompts = [[Text("draw " + word)] for word in ("one", "two", "three", "four", "five")]
    whole = generator.respond_all(prompts, IMAGE)
    parts = generator.respond_all(prompts, IMAGE, batch_size=2)
    assert codes(whole) == codes(parts)
    assert len(set(codes(whole))) > 1


def codes(answers: list[Answer]) -> list[tuple[int, ...]]:
    return [piece.codes for answer in answers for piece in answer if isinstance(piece, Drawing)]
