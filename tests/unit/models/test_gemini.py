"""The whole model: packing changes nothing, embeddings land on their placeholders, a text-only row runs encoders."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from megatron_gemini.config.encoders import AudioConfig, VisionConfig
from megatron_gemini.config.model import ModelConfig
from megatron_gemini.config.run import RunConfig
from megatron_gemini.contracts import Batch, Media, TokenLayout
from megatron_gemini.models.encoders import run_lengths
from megatron_gemini.models.gemini import Gemini
from megatron_gemini.models.heads import NextTokenLoss
from megatron_gemini.models.placement import Embeddings, place
from megatron_gemini.parallel.parameters import initialize
from megatron_gemini.parallel.tensor.layers import LayerFactory
from megatron_gemini.parallel.topology import Topology

LAYOUT = TokenLayout(30, (("image", 8),))
CONFIG = RunConfig(
    model=ModelConfig(width=32, layers=2, heads=4, kv_heads=1, head_width=8, mlp_width=48, init_std=0.1),
    encoders={
        "vision": VisionConfig(width=16, layers=1, heads=2, mlp_width=32, patch=4, max_side=16),
        "audio": AudioConfig(width=16, layers=1, heads=2, mlp_width=32, kernel=3, mels=8),
    },
)
Z_LOSS = 1e-2
LOSS = NextTokenLoss(len(LAYOUT.targets), Z_LOSS)


@pytest.fixture(scope="module")
def model():
    model = Gemini(CONFIG, LAYOUT, LayerFactory(Topology.serial()), LOSS)
    initialize(model, 0)
    return model


def document(length, *, images=(), audio=0, seed=0):
    """One document as a row: bos, then an image run (rows, columns) each, an audio run, and text to `length`."""
    generator = torch.Generator().manual_seed(seed)
    token = torch.randint(LAYOUT.text_size, (length,), generator=generator)
    token[-2:] = LAYOUT.code_range("image").start  # targets of both modalities
    span, media, begin = torch.zeros(length, dtype=torch.int32), {}, 1
    if images:
        counts = [rows * columns for rows, columns in images]
        for number, count in enumerate(counts):
            token[begin : begin + count] = LAYOUT.control("image")
            span[begin : begin + count] = number + 1
            begin += count
        media["vision"] = Media(
            torch.rand(sum(counts), 48, generator=generator) * 2 - 1,
            torch.tensor([(1, rows, columns) for rows, columns in images]),
            torch.zeros(len(images)),
            torch.arange(1, begin),
        )
    if audio:
        frames, count = audio, math.ceil(math.ceil(audio / 2) / 2)
        token[begin : begin + count] = LAYOUT.control("audio")
        span[begin : begin + count] = 100
        media["audio"] = Media(
            torch.randn(frames, 8, generator=generator),
            torch.tensor([(frames, 1, 1)]),
            torch.zeros(1),
            torch.arange(begin, begin + count),
        )
        begin += count
    weight = torch.rand(length, generator=generator)
    weight[:begin] = 0
    weight[-1] = 0
    target = token.roll(-1)
    return Batch(
        token,
        target,
        weight,
        torch.arange(length),
        torch.ones(length, dtype=torch.int32),
        span,
        (target >= LAYOUT.code_range("image").start).to(torch.int8),
        {},
        media,
        [f"sample-{seed}"],
    )


def packed(documents, padding=0):
    """The documents in one row, written without data.pack so that neither can hide the other's mistake."""
    names = [f.name for f in dataclasses.fields(Batch) if f.name.endswith("_T")]
    parts = {name: [getattr(d, name).clone() for d in documents] for name in names}
    begin, media = 0, {"vision": [], "audio": []}
    for number, d in enumerate(documents):
        parts["segment_T"][number] += number
        parts["span_T"][number][parts["span_T"][number] > 0] += 1000 * number
        for name, m in d.media.items():
            media[name].append(dataclasses.replace(m, token_O=m.token_O + begin))
        begin += len(d.token_T)
    tail = torch.zeros(padding)
    joined = {name: torch.cat([*xs, tail.to(xs[0].dtype)]) for name, xs in parts.items()}
    fields = [f.name for f in dataclasses.fields(Media)]
    together = {
        name: Media(*(torch.cat([getattr(m, f) for m in ms]) for f in fields)) for name, ms in media.items() if ms
    }
    return Batch(**joined, media=together, samples=[d.samples[0] for d in documents])


DOCUMENTS = [
    document(14, images=[(2, 2), (1, 3)], seed=1),
    document(6, seed=2),
    document(17, images=[(2, 3)], audio=9, seed=3),
    document(6, seed=4),
]


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_a_packed_row_equals_one_document_at_a_time(model):
    model.zero_grad(set_to_none=True)
    alone = [model(d) for d in DOCUMENTS]
    for output in alone:
        output.loss.backward()
    separate = gradients(model)
    model.zero_grad(set_to_none=True)
    together = model(packed(DOCUMENTS, padding=5))
    together.loss.backward()
    torch.testing.assert_close(together.loss, sum(o.loss for o in alone), rtol=1e-5, atol=1e-5)
    for name in ("nll", "weight"):
        torch.testing.assert_close(together.sums[name], sum(o.sums[name] for o in alone), rtol=1e-5, atol=1e-5)
    assert set(separate) == set(dict(model.named_parameters()))
    for name, grad in gradients(model).items():
        torch.testing.assert_close(grad, separate[name], rtol=1e-5, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_the_loss_is_what_it_says(model):
    batch = packed(DOCUMENTS, padding=3)
    output = model(batch)
    logits = model.logits(model.hidden(batch)).double()
    assert logits.shape == (len(batch.token_T), LAYOUT.size)
    nll = F.cross_entropy(logits, batch.target_T, reduction="none")
    weight = batch.weight_T.double()
    z_loss = Z_LOSS * (weight * logits.logsumexp(-1) ** 2).sum()
    torch.testing.assert_close(output.loss.double(), (weight * nll).sum() + z_loss, rtol=1e-5, atol=1e-5)
    for modality in range(len(LAYOUT.targets)):
        of = batch.modality_T == modality
        assert (weight * of).sum() > 0
        torch.testing.assert_close(output.sums["nll"][modality].double(), (weight * nll * of).sum())
        torch.testing.assert_close(output.sums["weight"][modality].double(), (weight * of).sum())
    assert not output.sums["nll"].requires_grad


def test_a_row_without_a_weighted_target_has_no_loss_and_a_whole_graph(model):
    batch = document(6, seed=2)
    batch.weight_T.zero_()
    model.zero_grad(set_to_none=True)
    output = model(batch)
    output.loss.backward()
    assert output.loss == 0
    assert all((grad == 0).all() for grad in gradients(model).values())


@pytest.mark.parametrize("documents", [[DOCUMENTS[1]], [DOCUMENTS[0]]])
def test_encoders_without_an_item_get_zero_gradients_and_change_nothing(model, documents):
    batch = packed(documents)
    model.zero_grad(set_to_none=True)
    output = model(batch)
    output.loss.backward()
    absent = [name for name in ("vision", "audio") if name not in batch.media]
    assert absent
    for name in absent:
        for parameter in (*model.encoders[name].parameters(), *model.connectors[name].parameters()):
            assert parameter.grad is not None and (parameter.grad == 0).all()
    text_only = dataclasses.replace(
        CONFIG,
        encoders={
            name: dataclasses.replace(section, enabled=name in batch.media) for name, section in CONFIG.encoders.items()
        },
    )
    twin = Gemini(text_only, LAYOUT, LayerFactory(Topology.serial()), LOSS)
    twin.load_state_dict({n: t for n, t in model.state_dict().items() if n in twin.state_dict()})
    assert torch.equal(twin(batch).loss, output.loss)


def test_embeddings_land_on_their_placeholders(model):
    batch = packed(DOCUMENTS)
    seen = {}
    handle = model.decoder.register_forward_pre_hook(lambda _, args: seen.update(h=args[0]))
    model.hidden(batch)
    handle.remove()
    wanted = model.decoder.embedding(batch.token_T) * CONFIG.model.width**0.5
    for name, media in batch.media.items():
        length_S = torch.from_numpy(run_lengths(name, media.grid_I3.numpy()))
        wanted[media.token_O] = model.connectors[name](model.encoders[name](media), length_S)
    assert torch.equal(seen["h"], wanted)


def test_placing_differentiates_into_the_stream_and_the_embeddings():
    h, e = torch.randn(5, 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    media = Media(torch.empty(0), torch.empty(0), torch.empty(0), torch.tensor([3, 1]))
    inputs = (h.requires_grad_(), e.requires_grad_())
    assert torch.autograd.gradcheck(lambda h, e: place(h, Embeddings(media.token_O, e)), inputs)
    assert torch.equal(place(h, Embeddings(media.token_O, e))[3], e[0])


@pytest.mark.parametrize("change", ["placeholder", "position", "moved"])
def test_a_placeholder_without_its_embedding_names_the_sample_and_both_counts(model, change):
    batch = packed([document(6, seed=2), document(14, images=[(2, 2)], seed=1)])
    media = batch.media["vision"]
    if change == "placeholder":
        batch.token_T[12] = LAYOUT.control("video")
        counts = "5 placeholders for the vision encoder, its media name 4 positions and the encoder gave 4"
    elif change == "position":
        media.token_O = media.token_O[:-1]
        counts = "4 placeholders for the vision encoder, its media name 3 positions and the encoder gave 4"
    else:
        media.token_O = media.token_O + 1
        counts = "4 placeholders for the vision encoder, its media name 4 positions and the encoder gave 4"
    with pytest.raises(ValueError, match=f"sample-1: the row has {counts}"):
        model(batch)


def test_a_placeholder_of_a_disabled_encoder_is_an_error():
    config = dataclasses.replace(CONFIG, encoders={**CONFIG.encoders, "audio": AudioConfig(enabled=False)})
    model = Gemini(config, LAYOUT, LayerFactory(Topology.serial()), LOSS)
    initialize(model, 0)
    with pytest.raises(ValueError, match="sample-3: the row has 3 placeholders for the audio encoder"):
        model(DOCUMENTS[2])


def test_an_untied_head_is_a_weight_of_its_own():
    config = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, tie_embeddings=False))
    model = Gemini(config, LAYOUT, LayerFactory(Topology.serial()), LOSS)
    initialize(model, 0)
    model(DOCUMENTS[1]).loss.backward()
    head, embedding = model.decoder.head.weight, model.decoder.embedding.weight
    assert not torch.equal(head, embedding)
    unused = torch.ones(LAYOUT.size, dtype=torch.bool)
    unused[DOCUMENTS[1].token_T] = False
    assert (embedding.grad[unused] == 0).all() and (head.grad[unused] != 0).any()


def test_every_norm_of_the_decoder_begins_without_a_scale(model):
    norms = {name: weight for name, weight in model.decoder.named_parameters() if "norm" in name}
    assert len(norms) > CONFIG.model.layers
    assert not any(weight.any() for weight in norms.values())
