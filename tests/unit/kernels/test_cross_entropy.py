"""Cross-entropy equals torch's in float64; z-loss its definition. The division over ranks: tests/distributed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_gemini.kernels.cross_entropy import cross_entropy


def reference(logits, target, weight, z_loss):
    logits, weight = logits.double(), weight.double()
    nll = F.cross_entropy(logits, target, reduction="none")
    return (weight * nll).sum() + z_loss * (weight * torch.logsumexp(logits, -1) ** 2).sum(), nll


def draw(tokens, rows, size, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(tokens, rows, generator=generator) * scale).requires_grad_()
    target = torch.randint(size, (tokens,), generator=generator)
    return logits, target, torch.rand(tokens, generator=generator)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 7), st.integers(1, 20), st.sampled_from([0.0, 0.1]), st.sampled_from([1e-3, 1.0, 50.0]))
def test_equals_torch_forward_and_backward(tokens, size, z_loss, scale):
    logits, target, weight = draw(tokens, size, size, scale)
    loss, nll = cross_entropy(logits, target, weight, z_loss=z_loss, first=0, size=size, group=None)
    wanted, wanted_nll = reference(logits, target, weight, z_loss)
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(nll.double(), wanted_nll, rtol=1e-5, atol=1e-5)
    (ours,), (theirs,) = torch.autograd.grad(3 * loss, logits), torch.autograd.grad(3 * wanted, logits)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_padded_rows_are_outside_the_softmax_and_get_no_gradient():
    logits, target, weight = draw(5, 12, 9)
    loss, _ = cross_entropy(logits, target, weight, z_loss=0.1, first=0, size=9, group=None)
    wanted, _ = reference(logits[:, :9], target, weight, 0.1)
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-5, atol=1e-5)
    before = logits.detach().clone()
    (grad,) = torch.autograd.grad(loss, logits)
    assert (grad[:, 9:] == 0).all() and (grad[:, :9] != 0).any()
    assert torch.equal(logits.detach(), before)


def test_logits_far_from_zero_do_not_overflow():
    logits = torch.tensor([[1e4, 1e4 - 1, 0.0]], requires_grad=True)
    loss, _ = cross_entropy(logits, torch.tensor([1]), torch.ones(1), z_loss=0.0, first=0, size=3, group=None)
    assert loss.item() == pytest.approx(1.3132617, rel=1e-4)


def test_a_second_backward_gives_the_same_gradient():
    logits, target, weight = draw(5, 9, 9)
    loss, _ = cross_entropy(logits, target, weight, z_loss=0.1, first=0, size=9, group=None)
    (first,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (second,) = torch.autograd.grad(loss, logits)
    assert torch.equal(first, second)


def test_bfloat16_logits_are_summed_in_float32():
    logits, target, weight = draw(4, 4096, 4096)
    low = logits.detach().bfloat16().requires_grad_()
    loss, nll = cross_entropy(low, target, weight, z_loss=0.0, first=0, size=4096, group=None)
    wanted, _ = reference(low, target, weight, 0.0)
    assert loss.dtype == nll.dtype == torch.float32
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-5, atol=1e-5)
    assert torch.autograd.grad(loss, low)[0].dtype == torch.bfloat16
