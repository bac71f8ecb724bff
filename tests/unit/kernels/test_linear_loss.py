"""Head and loss in one equal torch's cross-entropy in float64, in any number of chunks, and never hold the logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_gemini.kernels.losses import dispatch, head_chunks, softmax_chunk
from megatron_gemini.kernels.losses.linear_cross_entropy import linear_cross_entropy, token_log_probabilities
from tools.bench.loss import peak_bytes

WIDTH = 6
BOTH = pytest.mark.parametrize("deferred", [False, True], ids=["now", "deferred"])


@pytest.fixture
def chunk_of(monkeypatch):
    """chunk_of(tokens, rows): the float32 loss of `rows` ids then works in chunks of `tokens`."""

    def set_chunk(tokens, rows, itemsize=4):
        monkeypatch.setitem(head_chunks.CHUNK_BYTES, "cpu", tokens * rows * itemsize)

    return set_chunk


def draw(tokens, rows, size, *, scale=1.0, seed=0, dtype=torch.float32, ignored=0):
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(tokens, WIDTH, generator=generator).to(dtype).requires_grad_()
    weight = (torch.randn(rows, WIDTH, generator=generator) * scale).to(dtype).requires_grad_()
    target = torch.randint(size, (tokens,), generator=generator)
    target[:ignored] = -100
    return h, weight, target, torch.rand(tokens, generator=generator) + 0.1


def reference(h, weight, target, token_weight, z_loss, size):
    """(loss, nll) of float64 logits, all at once."""
    logits = h.double() @ weight.double()[:size].T
    nll = F.cross_entropy(logits, target, reduction="none")
    lse = logits.logsumexp(-1) * (target >= 0)
    return (token_weight.double() * (nll + z_loss * lse.square())).sum(), nll


def place(size):
    return {"first": 0, "size": size, "group": None}


def relative(found, wanted):
    return float((found.double() - wanted).norm() / wanted.norm().clamp_min(1e-30))


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(0, 9),
    size=st.integers(1, 20),
    padding=st.integers(0, 3),
    ignored=st.integers(0, 3),
    chunk=st.sampled_from([1, 2, 4, 100]),
    z_loss=st.sampled_from([0.0, 0.1]),
    scale=st.sampled_from([1e-3, 1.0, 20.0]),
    deferred=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_equals_float64_in_any_number_of_chunks(tokens, size, padding, ignored, chunk, z_loss, scale, deferred, seed):
    h, weight, target, token_weight = draw(tokens, size + padding, size, scale=scale, seed=seed, ignored=ignored)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(head_chunks.CHUNK_BYTES, "cpu", chunk * size * 4)
        loss, nll = linear_cross_entropy(
            h, weight, target, token_weight, z_loss=z_loss, deferred=deferred, **place(size)
        )
        grads = torch.autograd.grad(3 * loss, (h, weight))
    wanted, wanted_nll = reference(h, weight, target, token_weight, z_loss, size)
    wanted_grads = torch.autograd.grad(3 * wanted, (h, weight))
    assert loss.dtype == nll.dtype == torch.float32 and not nll.requires_grad
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(nll.double(), wanted_nll, rtol=1e-5, atol=1e-4)
    for found, expected in zip(grads, wanted_grads, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * max(1, scale))


@BOTH
def test_padded_rows_are_outside_the_softmax_and_get_a_gradient_of_zero(deferred):
    h, weight, target, token_weight = draw(5, 12, 9)
    with torch.no_grad():
        weight[9:] = 1e3  # would take the whole softmax
    loss, _ = linear_cross_entropy(h, weight, target, token_weight, z_loss=0.1, deferred=deferred, **place(9))
    torch.testing.assert_close(loss.double(), reference(h, weight, target, token_weight, 0.1, 9)[0])
    (grad,) = torch.autograd.grad(loss, weight)
    assert (grad[9:] == 0).all() and (grad[:9] != 0).any()


def test_logits_far_from_zero_keep_their_precision():
    h, weight = torch.tensor([[1e4]]), torch.tensor([[1.0], [0.9999], [0.0]], requires_grad=True)
    for deferred in (False, True):
        options = {"z_loss": 0.0, "deferred": deferred, **place(3)}
        loss, _ = linear_cross_entropy(h, weight, torch.tensor([1]), torch.ones(1), **options)
        assert loss.item() == pytest.approx(1.3132617, rel=1e-3)  # 1e4 itself has six and a half digits
        (grad,) = torch.autograd.grad(loss, weight)
        torch.testing.assert_close(grad[:, 0] / 1e4, torch.tensor([0.7310586, -0.7310586, 0.0]), rtol=1e-3, atol=1e-6)


@BOTH
def test_a_second_backward_gives_the_same_gradient(deferred):
    h, weight, target, token_weight = draw(5, 9, 9)
    loss, _ = linear_cross_entropy(h, weight, target, token_weight, z_loss=0.1, deferred=deferred, **place(9))
    first = torch.autograd.grad(2 * loss, (h, weight), retain_graph=True)
    second = torch.autograd.grad(2 * loss, (h, weight))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@BOTH
@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_input_gets_no_gradient_and_the_other_keeps_its(deferred, frozen, chunk_of):
    chunk_of(2, 9)
    h, weight, target, token_weight = draw(5, 9, 9)
    wanted = torch.autograd.grad(reference(h, weight, target, token_weight, 0.1, 9)[0], (h, weight))
    inputs = [x.detach().requires_grad_(i != frozen) for i, x in enumerate((h, weight))]
    linear_cross_entropy(*inputs, target, token_weight, z_loss=0.1, deferred=deferred, **place(9))[0].backward()
    assert inputs[frozen].grad is None
    torch.testing.assert_close(inputs[1 - frozen].grad, wanted[1 - frozen], rtol=1e-5, atol=1e-5)


def test_log_probabilities_have_the_gradient_of_any_loss_of_them(chunk_of):
    chunk_of(2, 9)
    h, weight, target, _ = draw(5, 9, 9, ignored=1)
    found = token_log_probabilities(h, weight, target, **place(9))
    logits = h.double() @ weight.double().T
    wanted = torch.where(target < 0, 0, logits.log_softmax(-1).gather(1, target.clamp_min(0)[:, None])[:, 0])
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
    losses = [F.logsigmoid(x.cumsum(0) - x.flip(0)).sum() for x in (found, wanted)]
    for ours, theirs in zip(*(torch.autograd.grad(loss, (h, weight)) for loss in losses), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_the_deferred_loss_differentiates_the_token_weights_as_well():
    h, weight, target, token_weight = draw(4, 9, 9, dtype=torch.float64)
    token_weight = token_weight.double().requires_grad_()

    def loss(h, weight, token_weight):
        return linear_cross_entropy(h, weight, target, token_weight, z_loss=0.1, deferred=True, **place(9))[0]

    assert torch.autograd.gradcheck(loss, (h, weight, token_weight))


def test_float64_stays_float64_and_passes_gradcheck():
    h, weight, target, token_weight = draw(4, 11, 9, dtype=torch.float64)

    def loss(h, weight):
        return linear_cross_entropy(h, weight, target, token_weight.double(), z_loss=0.1, **place(9))[0]

    assert loss(h, weight).dtype == torch.float64
    assert torch.autograd.gradcheck(loss, (h, weight))


@BOTH
def test_a_bfloat16_weight_gradient_is_added_up_in_float32(deferred, chunk_of):
    """In 64 chunks its error is that of one rounding, not of 64."""
    errors = {}
    for chunks in (1, 64):
        h, weight, target, token_weight = draw(256, 32, 32, dtype=torch.bfloat16)
        chunk_of(256 // chunks, 32, itemsize=6)
        loss, _ = linear_cross_entropy(h, weight, target, token_weight, z_loss=0.0, deferred=deferred, **place(32))
        (grad,) = torch.autograd.grad(loss, weight)
        (wanted,) = torch.autograd.grad(reference(h, weight.double(), target, token_weight, 0.0, 32)[0], weight)
        assert grad.dtype == torch.bfloat16 and loss.dtype == torch.float32
        errors[chunks] = relative(grad, wanted.double())
    assert errors[64] < 1.5 * errors[1] < 0.03


@BOTH
def test_peak_memory_is_a_chunk_of_logits_and_the_gradients(deferred, chunk_of):
    tokens, rows = 512, 4096
    h, weight, target, token_weight = draw(tokens, rows, rows)
    chunk_of(32, rows)

    def step():
        linear_cross_entropy(h, weight, target, token_weight, z_loss=0.1, deferred=deferred, **place(rows))[
            0
        ].backward()

    returned, chunk = 4 * WIDTH * (tokens + rows), 4 * 32 * rows
    assert peak_bytes(step, torch.device("cpu")) < returned + 1.3 * chunk < 4 * tokens * rows / 8


@pytest.mark.parametrize(("dtype", "tokens"), [(torch.float64, 14), (torch.float32, 28), (torch.bfloat16, 18)])
def test_a_chunk_of_float32_logits_has_no_second_copy_beside_it(chunk_of, dtype, tokens):
    """Lower precisions keep theirs in float32 as well, which counts as a part of the chunk."""
    chunk_of(28, 9)
    h, weight, target, _ = draw(60, 9, 9, dtype=dtype)
    rows = head_chunks.HeadChunks(h, weight, target, head_chunks.VocabularyRows(0, 9, None, False, None)).rows
    assert rows[:2] == [slice(0, tokens), slice(tokens, 2 * tokens)]


def test_without_gradients_none_are_made(monkeypatch):
    monkeypatch.setattr(head_chunks.GradientSums, "__init__", None)  # calling it fails
    h, weight, target, token_weight = draw(5, 9, 9)
    with torch.no_grad():
        loss, _ = linear_cross_entropy(h, weight, target, token_weight, z_loss=0.1, **place(9))
    assert not loss.requires_grad
    torch.testing.assert_close(loss.double(), reference(h, weight, target, token_weight, 0.1, 9)[0].detach())


def test_the_deferred_backward_keeps_the_parameter_and_no_view_of_it():
    """ZeRO-3 frees and gathers the parameter in place between forward and backward; `now` keeps its gradient only."""
    h, weight, target, token_weight = draw(5, 12, 9)
    weight = torch.nn.Parameter(weight.detach())
    saved = token_log_probabilities(h, weight, target, **place(9)).grad_fn.saved_tensors
    assert any(x is weight for x in saved)
    storages = [x.untyped_storage().data_ptr() for x in saved if x is not weight]
    assert weight.untyped_storage().data_ptr() not in storages
    loss, _ = linear_cross_entropy(h, weight, target, token_weight, z_loss=0.1, **place(9))
    storages = [x.untyped_storage().data_ptr() for x in loss.grad_fn.saved_tensors]
    assert weight.untyped_storage().data_ptr() not in storages


def test_inputs_that_are_not_contiguous_are_read_as_they_are():
    h, weight, target, token_weight = draw(5, 9, 9)
    strided = [x.detach().t().contiguous().t().requires_grad_() for x in (h, weight)]
    every_other = torch.stack((target, target + 100), 1)[:, 0]
    outs = [
        linear_cross_entropy(*inputs, ids, token_weight, z_loss=0.1, **place(9))[0]
        for inputs, ids in (((h, weight), target), (strided, every_other))
    ]
    torch.testing.assert_close(outs[0], outs[1])
    for a, b in zip(torch.autograd.grad(outs[0], (h, weight)), torch.autograd.grad(outs[1], strided), strict=True):
        torch.testing.assert_close(a, b)


BAD = {
    "three dimensions": ({"h": torch.zeros(1, 5, WIDTH)}, r"h_TD \(1, 5, 6\) and weight_VD \(9, 6\)"),
    "another width": ({"weight": torch.zeros(9, 7)}, r"h_TD \(5, 6\) and weight_VD \(9, 7\)"),
    "two dtypes": ({"weight": torch.zeros(9, WIDTH).bfloat16()}, "h_TD is torch.float32 and weight_VD torch.bfloat16"),
    "float targets": ({"target": torch.zeros(5)}, "target_T is torch.float32"),
    "too few targets": ({"target": torch.zeros(4).long()}, r"target_T is torch.int64 \(4,\); h_TD \(5, 6\)"),
    "an id outside": ({"target": torch.tensor([0, 9, 0, 0, 0])}, "target_T holds id 9, the vocabulary has 9 ids"),
    "another device": ({"target": torch.zeros(5, device="meta").long()}, "target_T on meta"),
    "too many weights": ({"token_weight": torch.ones(6)}, r"weight_T is torch.float32 \(6,\)"),
    "whole weights": ({"token_weight": torch.ones(5).long()}, "weight_T is torch.int64"),
    "a weight's gradient": ({"token_weight": torch.ones(5, requires_grad=True)}, "detach it or defer"),
    "rows elsewhere without a group": ({"size": 12}, "first=0 and size=12 with 9 rows"),
    "an unknown backend": ({"backend": "cutlass"}, "no backend 'cutlass'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_an_error_that_names_it(name):
    change, message = BAD[name]
    h, weight, target, token_weight = draw(5, 9, 9)
    given_ = {"h": h, "weight": weight, "target": target, "token_weight": token_weight, "size": 9} | change
    inputs = [given_.pop(key) for key in ("h", "weight", "target", "token_weight")]
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(*inputs, z_loss=0.0, first=0, group=None, **given_)


@pytest.mark.parametrize("name", ["torch", "triton"])
def test_a_forced_backend_is_the_one_that_runs(name, monkeypatch):
    """Both compute by torch here and say who was asked; test_linear_loss_triton.py runs the kernels themselves."""
    ran, torch_backend = [], softmax_chunk.TORCH

    def spy(backend):
        def note(function):
            return lambda *arguments: (ran.append(backend), function(*arguments))[1]

        return softmax_chunk.LossBackend(backend, note(torch_backend.statistics), note(torch_backend.gradient))

    monkeypatch.setattr(dispatch, "TORCH", spy("torch"))
    monkeypatch.setattr(dispatch, "_triton", lambda: spy("triton"))
    dispatch.choose_backend.cache_clear()
    try:
        h, weight, target, token_weight = draw(5, 9, 9)
        for deferred in (False, True):
            options = {"z_loss": 0.1, "deferred": deferred, "backend": name, **place(9)}
            linear_cross_entropy(h, weight, target, token_weight, **options)[0].backward()
        token_log_probabilities(h, weight, target, backend=name, **place(9))
    finally:
        dispatch.choose_backend.cache_clear()
    assert ran == [name] * 5


def test_the_backend_is_named_with_its_reason():
    assert dispatch.loss_backend(torch.device("cpu"))[0] == "torch"
    assert dispatch.loss_backend(torch.device("cuda"))[0] == "triton"
    assert dispatch.choose_backend(torch.device("cpu"), torch.float32).name == "torch"
    assert dispatch.choose_backend(torch.device("cuda"), torch.float64).name == "torch"
