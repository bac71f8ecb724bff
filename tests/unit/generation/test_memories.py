"""Generation with a model whose decoder layers read an encoder's memory beside the stream."""

import dataclasses
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from megatron_gemini.contracts import RowFormat
from megatron_gemini.data.packing.pack import pack
from megatron_gemini.data.samples.document import Document, build_document
from megatron_gemini.data.samples.items import Text
from megatron_gemini.generation.sample import generate
from megatron_gemini.generation.sequences import RecomputedSequences
from megatron_gemini.generation.settings import SampleSettings
from megatron_gemini.generation.steps import Decoding
from megatron_gemini.modalities.image.item import Image
from megatron_gemini.models.gemini import Gemini
from megatron_gemini.registry import CONNECTORS
from tests.extension.reading import READING, ReadingConfig
from tests.unit.generation.test_sample import LAYOUT, RUNS, Letters, tiny_config, tiny_model


@pytest.fixture(scope="module")
def model() -> Iterator[Gemini]:
    """A model without an audio encoder, one of whose layers reads images."""
    CONNECTORS.register("reading", READING)
    config = tiny_config()
    vision = dataclasses.replace(config.encoders["vision"], connector=ReadingConfig())
    audio = dataclasses.replace(config.encoders["audio"], enabled=False)
    yield tiny_model(dataclasses.replace(config, encoders={"vision": vision, "audio": audio}))
    CONNECTORS.unregister("reading")


def documents(model: Gemini, seed: int = 0) -> list[Document]:
    random = torch.Generator().manual_seed(seed)
    pixels = [torch.randint(0, 256, size, generator=random, dtype=torch.uint8) for size in ((12, 20, 3), (16, 16, 3))]
    prompts = [
        [Image(pixels[0].numpy()), Text("what is this?")],
        [Text("draw a seven")],
        [Text("two "), Image(pixels[1].numpy()), Image(pixels[0].numpy())],
    ]
    return [
        build_document(
            prompt, [], layout=LAYOUT, text_tokenizer=Letters(), encoders=model.config.encoders, key=str(number)
        )
        for number, prompt in enumerate(prompts)
    ]


def test_what_is_read_as_a_memory_has_one_placeholder_and_no_span(model: Gemini) -> None:
    document = documents(model)[0]
    (image,) = document.media
    assert (image.memory, image.spans) == (np.prod(image.grid), ())
    assert (document.token_L == LAYOUT.control("image")).sum() == 1
    assert not document.span_L.any()


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_every_token_of_an_answer_reads_the_memory_of_its_prompt(model: Gemini, guidance: float) -> None:
    """The log-probability of each token is that of the whole sequence, computed afresh with its images."""
    prompts = documents(model)
    said: dict[int, list[tuple[int, float]]] = {}
    for step in Decoding(model, LAYOUT, prompts, SampleSettings(seed=3, guidance=guidance, max_tokens=12), RUNS):
        for sampled in step.tokens:
            said.setdefault(sampled.sequence, []).append((sampled.token, sampled.logprob))
    for number, prompt in enumerate(prompts):
        whole = RecomputedSequences(model, pack([prompt], len(prompt), RowFormat()))
        with torch.inference_mode():
            logits_1V = whole.start()
            for token, logprob in said[number]:
                assert logprob == pytest.approx(float(logits_1V[0].double().log_softmax(-1)[token]), abs=1e-4)
                logits_1V = whole.append([token])


def test_an_answer_depends_on_the_images_that_are_read(model: Gemini) -> None:
    settings = SampleSettings(temperature=0.0, max_tokens=20, answer="text")
    first, second = (generate(model, LAYOUT, documents(model, seed), settings, RUNS) for seed in (0, 1))
    assert first[1] == second[1], "this prompt has no image"
    assert (first[0], first[2]) != (second[0], second[2])
