"""Answers as texts and pictures."""

import weakref
from typing import Any

import numpy as np
import pytest

from megatron_gemini.checkpoint.inference import load_for_inference
from megatron_gemini.contracts import TokenLayout
from megatron_gemini.data.samples.items import Codes, Text
from megatron_gemini.generation.api import Answer, Drawing, Generator
from megatron_gemini.generation.cache import KVCache
from megatron_gemini.generation.code_runs import code_runs
from megatron_gemini.generation.pieces import split_answer
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
    runs = code_runs(layout, {"image": 2})
    assert split_answer(layout, runs, answer) == [Codes("image", (5, 0)), [3, 4], Codes("image", (1, 2))]
    assert split_answer(layout, runs, []) == []


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


def test_streamed_pieces_join_to_the_answer(generator: Generator) -> None:
    settings = SampleSettings(answer="text", max_tokens=40, temperature=2.0, seed=5)
    parts = list(generator.stream([Text("what is this")], settings))
    assert len(parts) > 3 and all(isinstance(part, str) for part in parts)
    assert "".join(map(str, parts)) == "".join(map(str, generator.respond([Text("what is this")], settings)))


def test_an_image_is_streamed_when_it_is_whole(generator: Generator) -> None:
    (streamed,) = generator.stream([Text("draw two")], IMAGE)
    (drawing,) = generator.respond([Text("draw two")], IMAGE)
    assert isinstance(streamed, Drawing) and isinstance(drawing, Drawing)
    assert streamed.codes == drawing.codes
    assert np.array_equal(streamed.pixels_HW3, drawing.pixels_HW3)


def test_a_stream_that_is_dropped_or_closed_frees_its_cache(generator: Generator, monkeypatch) -> None:
    made: list[weakref.ref[KVCache]] = []
    plain = KVCache.__init__

    def watched(cache: KVCache, *given: Any) -> None:
        made.append(weakref.ref(cache))
        plain(cache, *given)

    monkeypatch.setattr(KVCache, "__init__", watched)
    settings = SampleSettings(answer="text", max_tokens=40, temperature=2.0, seed=5)
    for end in (lambda stream: stream.close(), lambda stream: None):
        stream = generator.stream([Text("what is this")], settings)
        next(stream)
        assert made[-1]() is not None
        end(stream)
        del stream
        assert made[-1]() is None


def test_a_stream_refuses_at_the_call(generator: Generator) -> None:
    with pytest.raises(ValueError, match="max_tokens is 3"):
        generator.stream([Text("draw")], SampleSettings(answer="image", max_tokens=3))


def test_rollouts_are_steps_of_several_samples(generator: Generator) -> None:
    prompts = [generator.open_document([Text(word)], word) for word in ("one", "two")]
    step = next(generator.decode(prompts, SampleSettings(answer="text", temperature=2.0), samples=3))
    assert [sampled.sequence for sampled in step.tokens] == [0, 1, 2, 3, 4, 5]


def codes(answers: list[Answer]) -> list[tuple[int, ...]]:
    return [piece.codes for answer in answers for piece in answer if isinstance(piece, Drawing)]
