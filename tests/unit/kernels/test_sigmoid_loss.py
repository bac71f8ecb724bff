"""The sigmoid loss equals the dense matrix in float64, and transformers' SigLIP, in tiles of any size.

Several ranks: tests/distributed/test_loss.py.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_gemini.kernels.losses import sigmoid
from megatron_gemini.kernels.losses.sigmoid import sigmoid_contrastive_loss
from tools.bench.loss import peak_bytes


def draw(pairs, width=8, *, seed=0, dtype=torch.float32, log_temperature=2.3, bias=-3.0):
    generator = torch.Generator().manual_seed(seed)
    sides = [F.normalize(torch.randn(pairs, width, generator=generator), dim=1).to(dtype) for _ in range(2)]
    return [x.requires_grad_() for x in (*sides, torch.tensor(log_temperature), torch.tensor(bias))]


def dense(image, text, log_temperature, bias):
    """The definition, with the whole matrix, in float64."""
    logits = image.double() @ text.double().T * log_temperature.double().exp() + bias.double()
    sign = 2 * torch.eye(len(logits), dtype=torch.float64) - 1
    return -F.logsigmoid(sign * logits).sum()


@settings(max_examples=60, deadline=None)
@given(
    pairs=st.integers(0, 9),
    chunk=st.sampled_from([1, 2, 3, 8, 100]),
    log_temperature=st.sampled_from([0.0, 2.3, 5.0]),
    bias=st.sampled_from([-10.0, 0.0, 30.0]),
    seed=st.integers(0, 1000),
)
def test_equals_the_dense_matrix_in_float64(pairs, chunk, log_temperature, bias, seed):
    inputs = draw(pairs, seed=seed, log_temperature=log_temperature, bias=bias)
    loss, wanted = sigmoid_contrastive_loss(*inputs, chunk=chunk), dense(*inputs)
    assert loss.dtype == torch.float32 and loss.shape == ()
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-5, atol=1e-6)
    grads = torch.autograd.grad(3 * loss, inputs)
    for found, expected in zip(grads, torch.autograd.grad(3 * wanted, inputs), strict=True):
        size = float(expected.abs().max()) if expected.numel() else 0.0
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * (1 + size) * (1 + pairs))


def test_float64_passes_gradcheck():
    inputs = [x.detach().double().requires_grad_() for x in draw(5)]
    assert torch.autograd.gradcheck(lambda *x: sigmoid_contrastive_loss(*x, chunk=2), inputs)


def test_equals_siglip_of_transformers():
    """The sum over texts, which transformers divides by their number; embeddings of its own random model."""
    from transformers import SiglipConfig, SiglipModel

    layer = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**layer, "vocab_size": 50, "max_position_embeddings": 6, "projection_size": 16}
    config = SiglipConfig(text_config=text, vision_config={**layer, "image_size": 8, "patch_size": 4})  # type: ignore[arg-type]
    torch.manual_seed(0)
    model = SiglipModel(config)
    with torch.no_grad():
        model.logit_scale.fill_(2.0)
        model.logit_bias.fill_(-1.5)
    output = model(input_ids=torch.randint(50, (5, 6)), pixel_values=torch.randn(5, 3, 8, 8), return_loss=True)
    loss = sigmoid_contrastive_loss(
        output.image_embeds, output.text_embeds, model.logit_scale, model.logit_bias, chunk=2
    )
    torch.testing.assert_close(loss / 5, output.loss, rtol=1e-5, atol=1e-6)
    parameters = list(model.parameters())
    theirs = torch.autograd.grad(output.loss, parameters, retain_graph=True, allow_unused=True)
    ours = torch.autograd.grad(loss / 5, parameters, allow_unused=True)
    assert sum(grad is not None for grad in ours) > 20
    for name, a, b in zip(dict(model.named_parameters()), ours, theirs, strict=True):
        assert (a is None) == (b is None), name
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_a_well_separated_pair_keeps_a_precise_loss():
    """softplus(x) - x of a large x would be 0 or noise."""
    one = torch.tensor([[1.0, 0.0]])
    loss = sigmoid_contrastive_loss(one, one, torch.tensor(3.0), torch.tensor(0.0))
    torch.testing.assert_close(loss.double(), dense(one, one, torch.tensor(3.0), torch.tensor(0.0)), rtol=1e-5, atol=0)


def test_bfloat16_embeddings_are_compared_in_float32():
    inputs = draw(40, dtype=torch.bfloat16, log_temperature=4.6)
    loss = sigmoid_contrastive_loss(*inputs, chunk=16)
    torch.testing.assert_close(loss.double(), dense(*inputs), rtol=1e-5, atol=1e-5)
    grads = torch.autograd.grad(loss, inputs)
    assert [grad.dtype for grad in grads] == [x.dtype for x in inputs]
    for found, expected in zip(grads, torch.autograd.grad(dense(*inputs), inputs), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)


def test_a_frozen_tower_gets_no_gradient_and_a_second_backward_the_same():
    image, text, log_temperature, bias = draw(5)
    image.requires_grad_(False)
    loss = sigmoid_contrastive_loss(image, text, log_temperature, bias)
    first = torch.autograd.grad(2 * loss, (text, bias), retain_graph=True)
    second = torch.autograd.grad(2 * loss, (text, bias), retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    loss.backward()
    assert image.grad is None and text.grad is not None
    with torch.no_grad():
        assert not sigmoid_contrastive_loss(image, text, log_temperature, bias).requires_grad


def test_peak_memory_is_a_few_tiles():
    pairs, chunk, width = 1024, 64, 8
    inputs = draw(pairs, width)
    embeddings, tile = 4 * pairs * width, 4 * chunk * chunk
    peak = peak_bytes(lambda: sigmoid_contrastive_loss(*inputs, chunk=chunk).backward(), torch.device("cpu"))
    assert peak < 6 * embeddings + 4 * tile < 4 * pairs * pairs / 8


BAD = {
    "unequal pairs": ({0: torch.zeros(4, 8)}, r"image_BD is \(4, 8\) and text_BD \(5, 8\)"),
    "one dimension": ({0: torch.zeros(5), 1: torch.zeros(5)}, r"image_BD is \(5,\)"),
    "two dtypes": ({1: torch.zeros(5, 8).bfloat16()}, "image_BD is torch.float32 and text_BD torch.bfloat16"),
    "integers": ({0: torch.zeros(5, 8).long(), 1: torch.zeros(5, 8).long()}, "image_BD is torch.int64"),
    "two temperatures": ({2: torch.zeros(2)}, r"log_temperature is torch.float32 \(2,\)"),
    "an integer bias": ({3: torch.tensor(-10)}, "bias is torch.int64"),
    "two devices": ({2: torch.zeros((), device="meta")}, r"the inputs are on \['cpu', 'meta'\]"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_an_error_that_names_it(name):
    change, message = BAD[name]
    inputs = [change.get(i, x.detach()) for i, x in enumerate(draw(5))]
    with pytest.raises(ValueError, match=message):
        sigmoid_contrastive_loss(*inputs)


def test_an_empty_tile_is_an_error():
    with pytest.raises(ValueError, match="chunk is 0"):
        sigmoid_contrastive_loss(*draw(5), chunk=0)


def test_texts_are_passed_on_once_less_than_there_are_ranks_and_their_gradients_all_the_way(monkeypatch):
    tags = []

    class Passing:
        def __init__(self, tensor, count, group, tag):
            self.tensor = tensor
            tags.append(tag)

        def wait(self):
            return self.tensor

    monkeypatch.setattr(sigmoid, "_Passing", Passing)
    monkeypatch.setattr(sigmoid, "_pairs_of_ranks", lambda text, *_: [len(text)] * 3)
    sigmoid_contrastive_loss(*draw(4), group=SimpleNamespace(size=lambda: 3, rank=lambda: 1))
    assert (tags.count(0), tags.count(1)) == (2, 3)
