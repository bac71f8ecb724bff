"""Generation with a tiny, randomly initialized Gemini that sees images, clips and sound."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from megatron_gemini.config.encoders import AudioConfig, VisionConfig
from megatron_gemini.config.model import ImageTokenizerConfig, ModelConfig
from megatron_gemini.config.run import RunConfig
from megatron_gemini.contracts import RowFormat, TokenLayout
from megatron_gemini.data.packing.pack import pack
from megatron_gemini.data.samples.document import Document, build_document
from megatron_gemini.data.samples.items import Codes, Item, Text
from megatron_gemini.generation.choose import guide
from megatron_gemini.generation.code_runs import code_runs
from megatron_gemini.generation.sample import generate
from megatron_gemini.generation.sequences import (
    CachedSequences,
    RecomputedSequences,
    concatenate,
    empty_prompts,
    extend,
    prompt_lengths,
)
from megatron_gemini.generation.settings import SampleSettings
from megatron_gemini.modalities.audio.item import Audio
from megatron_gemini.modalities.image.item import Image
from megatron_gemini.modalities.video.item import Video
from megatron_gemini.models.gemini import Gemini
from megatron_gemini.parallel.parameters import initialize
from megatron_gemini.parallel.tensor.layers import LayerFactory
from megatron_gemini.parallel.topology import Topology

CODES = 4
LAYOUT = TokenLayout(30, (("image", 12),))
RUNS = code_runs(LAYOUT, {"image": CODES})


class Letters:
    """A text tokenizer of one id a character."""

    def encode(self, text: str) -> list[int]:
        return [ord(letter) % LAYOUT.text_size for letter in text]


def tiny_config(kv_heads: int = 1) -> RunConfig:
    # A large deviation, so that a random model is sure of what it says and one prompt's answer is not another's.
    model = ModelConfig(
        width=32, layers=2, heads=4, kv_heads=kv_heads, head_width=8, mlp_width=64, init_std=0.3, tie_embeddings=False
    )
    vision = VisionConfig(width=16, layers=1, heads=2, mlp_width=32, patch=4, max_side=16)
    audio = AudioConfig(width=16, layers=1, heads=2, mlp_width=32, mels=16)
    tokenizer = ImageTokenizerConfig(image_size=8, patch=4, width=16, layers=1, heads=2, mlp_width=32, codes=12)
    return RunConfig(model=model, encoders={"vision": vision, "audio": audio}, image_tokenizer=tokenizer)


def tiny_model(config: RunConfig) -> Gemini:
    model = Gemini(config, LAYOUT, LayerFactory(Topology.serial()))
    initialize(model, seed=1)
    return model.eval()


@pytest.fixture(scope="module")
def model() -> Gemini:
    return tiny_model(tiny_config())


def document(*items: Item) -> Document:
    config = tiny_config()
    return build_document(items, [], layout=LAYOUT, text_tokenizer=Letters(), encoders=config.encoders, key="test")


def prompts() -> list[Document]:
    """Of every modality, of unequal lengths."""
    noise = np.random.default_rng(0)
    pixels = noise.integers(0, 255, (3, 12, 16, 3), dtype=np.uint8)
    wave = noise.normal(size=4000).astype(np.float32)
    return [
        document(Text("draw a seven")),
        document(Image(pixels[0]), Text("what is this?")),
        document(Text("two "), Image(pixels[1]), Codes("image", (1, 2, 3, 4)), Text("clip"), Video(pixels, 0.5)),
        document(Audio(wave), Text("x")),
        document(),
    ]


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_cached_logits_equal_recomputed_ones(kv_heads: int) -> None:
    model, documents = tiny_model(tiny_config(kv_heads)), prompts()
    row = pack(documents, sum(map(len, documents)), RowFormat())
    cached, recomputed = CachedSequences(model, row, 8), RecomputedSequences(model, row)
    draw = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        got, expected = cached.start(), recomputed.start()
        for step in range(8):
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
            if step == 3:
                cached.keep([4, 0, 2])
                recomputed.keep([4, 0, 2])
                got, expected = got[[4, 0, 2]], expected[[4, 0, 2]]
            tokens = torch.randint(LAYOUT.text_size, (len(got),), generator=draw).tolist()
            got, expected = cached.append(tokens), recomputed.append(tokens)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_cached_generation_equals_uncached_generation(model: Gemini, guidance: float) -> None:
    settings = SampleSettings(top_k=20, top_p=0.95, seed=3, guidance=guidance, max_tokens=16)
    cached = generate(model, LAYOUT, prompts(), settings, RUNS)
    recomputed = generate(model, LAYOUT, prompts(), dataclasses.replace(settings, cache=False), RUNS)
    assert cached == recomputed
    assert len({tuple(answer) for answer in cached}) > 2, "the answers should differ, or nothing was compared"


def test_a_sequence_does_not_depend_on_its_batch_mates(model: Gemini) -> None:
    settings = SampleSettings(guidance=1.5, max_tokens=16)
    together = generate(model, LAYOUT, prompts(), settings, RUNS, seeds=[10, 11, 12, 13, 14])
    alone = [generate(model, LAYOUT, [d], settings, RUNS, seeds=[10 + i])[0] for i, d in enumerate(prompts())]
    assert together == alone


def test_the_seed_decides(model: Gemini) -> None:
    same = [generate(model, LAYOUT, prompts()[:2], SampleSettings(seed=5, max_tokens=12), RUNS) for _ in range(2)]
    other = generate(model, LAYOUT, prompts()[:2], SampleSettings(seed=6, max_tokens=12), RUNS)
    assert same[0] == same[1] != other


def test_an_asked_image_is_one_whole_image_and_guidance_changes_it(model: Gemini) -> None:
    settings = SampleSettings(answer="image", max_tokens=CODES + 3)
    plain = generate(model, LAYOUT, prompts()[:4], settings, RUNS)
    guided = generate(model, LAYOUT, prompts()[:4], dataclasses.replace(settings, guidance=4.0), RUNS)
    for answer in plain + guided:
        begin, *codes, end = answer
        assert (begin, end) == (LAYOUT.control("image_begin"), LAYOUT.control("image_end"))
        assert len(codes) == CODES and all(code in LAYOUT.code_range("image") for code in codes)
    assert plain != guided


def test_guidance_of_one_is_the_prompted_model_and_of_zero_its_twin() -> None:
    logits_BV = torch.randn(6, 10)
    torch.testing.assert_close(guide(logits_BV, [True] * 3, 1.0), logits_BV[:3])
    torch.testing.assert_close(guide(logits_BV, [True] * 3, 0.0), logits_BV[3:])
    torch.testing.assert_close(guide(logits_BV, [True] * 3, 3.0), logits_BV[3:] + 3 * (logits_BV[:3] - logits_BV[3:]))


def test_guidance_leaves_text_alone() -> None:
    logits_BV = torch.randn(4, 10)
    guided_BV = guide(logits_BV, [False, True], 5.0)
    assert torch.equal(guided_BV[0], logits_BV[0])
    assert not torch.allclose(guided_BV[1], logits_BV[1])


def test_twins_are_empty_prompts(model: Gemini) -> None:
    """Guidance of 0 on image codes draws what the empty prompt draws."""
    settings = SampleSettings(answer="image", guidance=0.0, temperature=0.0, max_tokens=CODES + 3)
    drawn = generate(model, LAYOUT, prompts()[:2], settings, RUNS)
    empty = generate(model, LAYOUT, [document()], dataclasses.replace(settings, guidance=1.0), RUNS)
    assert drawn == empty * 2


def test_greedy_takes_the_likeliest_legal_token(model: Gemini) -> None:
    documents = prompts()[:1]
    settings = SampleSettings(temperature=0.0, max_tokens=6, answer="text")
    answer = generate(model, LAYOUT, documents, settings, RUNS)[0]
    sequences = RecomputedSequences(model, pack(documents, len(documents[0]), RowFormat()))
    legal = [*range(LAYOUT.text_size), LAYOUT.control("eos")]
    with torch.inference_mode():
        logits_BV = sequences.start()
        for token in answer:
            assert token == legal[int(logits_BV[0, legal].argmax())]
            logits_BV = sequences.append([token])


def test_an_extended_row_is_the_row_of_the_longer_documents() -> None:
    config, documents = tiny_config(), prompts()
    longer = [
        build_document(
            [],
            [Text("abc"[:i])],
            layout=LAYOUT,
            text_tokenizer=Letters(),
            encoders=config.encoders,
            key="",
        ).token_L[3 : 3 + i]
        for i in range(len(documents))
    ]
    row = extend(pack(documents, sum(map(len, documents)), RowFormat()), [new.tolist() for new in longer])
    for old, new in zip(documents, longer, strict=True):
        for name, value in (("token_L", new), ("loss_L", new < 0), ("modality_L", new * 0), ("span_L", new * 0)):
            whole = getattr(old, name)
            setattr(old, name, np.concatenate([whole, value.astype(whole.dtype)]))
    expected = pack(documents, len(row.token_T), RowFormat())
    for name in ("token_T", "position_T", "segment_T", "span_T"):
        assert torch.equal(getattr(row, name), getattr(expected, name)), name
    for encoder, media in expected.media.items():
        assert torch.equal(row.media[encoder].token_O, media.token_O)


def test_empty_prompts_are_bos_user_model() -> None:
    row = concatenate(empty_prompts(LAYOUT, 1), empty_prompts(LAYOUT, 2))
    expected = pack([document()] * 3, 9, RowFormat())
    for name in ("token_T", "position_T", "segment_T", "span_T"):
        assert torch.equal(getattr(row, name), getattr(expected, name)), name
    assert prompt_lengths(row) == [3, 3, 3]


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", -1.0), ("top_k", -1), ("top_p", 0.0), ("top_p", 1.5), ("max_tokens", 0), ("answer", "sound")],
)
def test_settings_out_of_range_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name} is {value!r}"):
        SampleSettings(**{name: value})
