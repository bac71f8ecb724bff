"""The product, norms and rotations equal float64 compositions of torch's own operations, gradients included."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from megatron_gemini.kernels import rope
from megatron_gemini.kernels.linear import linear
from megatron_gemini.kernels.norm import rms_norm
from megatron_gemini.kernels.rope import apply_rope, apply_rope_to_both, rope_cos_sin

EPS = 1e-3  # large enough that forgetting it fails


def tensors(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def norm64(x, weight):
    return F.rms_norm(x, x.shape[-1:], None, EPS) * (1 + weight)


def assert_same(ours, theirs, inputs, atol=1e-5):
    """`ours(*inputs)` in float32 equals `theirs(*inputs)` in float64, and so do all gradients."""
    doubles = [x.detach().double().requires_grad_() for x in inputs]
    out, wanted = ours(*inputs), theirs(*doubles)
    outs, wanteds = (x if isinstance(x, tuple) else (x,) for x in (out, wanted))
    generator = torch.Generator().manual_seed(9)
    grads = [torch.randn(x.shape, generator=generator) for x in outs]
    for a, b in zip(outs, wanteds, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=atol)
    found = torch.autograd.grad(outs, inputs, grads)
    for a, b in zip(found, torch.autograd.grad(wanteds, doubles, [g.double() for g in grads]), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=atol)


@pytest.mark.parametrize("shape", [(5, 16), (5, 3, 16), (0, 16)])
def test_rms_norm_equals_torch(shape):
    x, weight = tensors(shape, (16,))
    assert_same(lambda x, w: rms_norm(x, w, EPS), norm64, [x, weight])


def test_rms_norm_of_strided_heads():
    x, weight = tensors((5, 2, 3, 16), (16,))
    assert_same(lambda x, w: rms_norm(x[:, 0], w, EPS), lambda x, w: norm64(x[:, 0], w), [x, weight])


def test_rms_norm_keeps_bfloat16_and_computes_in_float32():
    x, weight = (t.detach().bfloat16().requires_grad_() for t in tensors((64, 256), (256,)))
    out = rms_norm(x, weight, EPS)
    wanted = norm64(x.double(), weight.double())
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, wanted.bfloat16(), rtol=1e-2, atol=1e-2)
    grads = torch.autograd.grad(out, (x, weight), torch.ones_like(out))
    for ours, theirs in zip(grads, torch.autograd.grad(wanted.sum(), (x, weight)), strict=True):
        assert ours.dtype == torch.bfloat16
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=3e-2)


@pytest.mark.parametrize("shape", [(6, 8), (2, 3, 8)])
def test_linear_equals_torch(shape):
    assert_same(linear, F.linear, tensors(shape, (5, 8)))


def test_the_weight_is_saved_as_itself_so_that_zero_3_can_take_its_memory():
    x, weight = torch.randn(6, 8), torch.nn.Parameter(torch.randn(5, 8))
    assert any(t is weight for t in linear(x, weight).grad_fn.saved_tensors)


def rotated64(x, position, theta):
    """RoPE as complex multiplication: value i and i + H/2 are the parts of one number."""
    half = x.shape[-1] // 2
    angle = position[:, None, None].double() * theta ** (-torch.arange(half, dtype=torch.float64) / half)
    out = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((out.real, out.imag), -1)


@pytest.mark.parametrize("large", [0, 1 << 17], ids=["by halves", "at once"])
def test_rotation_equals_complex_multiplication(large, monkeypatch):
    monkeypatch.setattr(rope, "LARGE", large)
    position = torch.tensor([0, 1, 2, 0, 7])
    cos_sin = rope_cos_sin(position, 8, 100.0, torch.float32)
    assert_same(lambda x: apply_rope(x, cos_sin), lambda x: rotated64(x, position, 100.0), tensors((5, 3, 8)))


@pytest.mark.parametrize("theta", [1e4, 1e6])
def test_the_tables_are_exact_for_positions_of_long_rows(theta):
    """To the rounding of float32, by angles in the 64 bits of x86's long double, or float64 where it has no more."""
    position = torch.tensor([0, 1, 4_097, 100_000, 1_000_000, 16_000_001])
    exponent = -np.arange(0, 64, 2, dtype=np.longdouble) / 64
    angle = position.numpy().astype(np.longdouble)[:, None] * np.longdouble(theta) ** exponent
    cos, sin = rope_cos_sin(position, 64, theta, torch.float32)
    for found, expected in ((cos, np.cos(angle)), (sin, np.sin(angle))):
        assert np.abs(found[:, 0, 32:].numpy() - expected).max() < 6.1e-8
    cos, sin = rope_cos_sin(position, 64, theta, torch.bfloat16)
    assert cos.dtype == sin.dtype == torch.bfloat16
    assert np.abs(cos[:, 0, 32:].float().numpy() - np.cos(angle)).max() <= 2**-9


@pytest.mark.parametrize("large", [0, 1 << 17], ids=["by halves", "at once"])
def test_both_are_rotated_as_each_is_and_back_again(large, monkeypatch):
    monkeypatch.setattr(rope, "LARGE", large)
    cos_sin = rope_cos_sin(torch.arange(5), 8, 100.0, torch.float32)
    q, k = tensors((5, 3, 8), (5, 1, 8))
    for both, single in zip(apply_rope_to_both(q, k, cos_sin), (q, k), strict=True):
        torch.testing.assert_close(both, apply_rope(single, cos_sin))
        torch.testing.assert_close(apply_rope(both, cos_sin, -1), single)


def test_large_and_small_tensors_are_rotated_alike_to_the_bit(monkeypatch):
    cos_sin = rope_cos_sin(torch.arange(5), 8, 100.0, torch.bfloat16)
    x = tensors((5, 3, 8))[0].detach().bfloat16()
    at_once = apply_rope(x, cos_sin)
    monkeypatch.setattr(rope, "LARGE", 0)
    assert torch.equal(apply_rope(x, cos_sin), at_once)


def test_a_rotation_keeps_nothing_of_what_it_rotated():
    x = tensors((5, 3, 8))[0]
    assert apply_rope(x, rope_cos_sin(torch.arange(5), 8, 100.0, torch.float32)).grad_fn.saved_tensors == ()
