"""Rotary position embedding (Su et al., 2021), in the half-split convention of Gemma: value i pairs with value i + H/2.

Shape suffixes: T tokens, N heads, H head width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from megatron_gemini.kernels.autograd import Gradients, NodeContext

# Elements from which a tensor is rotated half by half, in one piece of new memory instead of three. On one CPU core at
# T=1024, N=4, H=64 that takes 0.22 instead of 2.8 ms, most of it page faults. Below it the number of calls counts.
LARGE = 1 << 17


class CosSin(NamedTuple):
    """cos_T1H, and sin_T1H whose first half is negated: x becomes x * cos + (x with its halves swapped) * sin."""

    cos_T1H: torch.Tensor
    sin_T1H: torch.Tensor


def rope_cos_sin(position_T: torch.Tensor, head_width: int, theta: float, dtype: torch.dtype) -> CosSin:
    """Angles position * theta^(-2i/H), once a microbatch for all layers. Computed in float64, returned in `dtype`."""
    # An angle in float32 is off by a multiple of the position: 6e-3 at 100,000. In float64 it takes 0.24 instead of
    # 0.11 ms for 1,024 tokens of width 64 on one CPU core, once a microbatch.
    exponent = torch.arange(0, head_width, 2, device=position_T.device, dtype=torch.float64) / head_width
    angle_TH = position_T[:, None].double() / theta**exponent
    cos, sin = angle_TH.cos().to(dtype), angle_TH.sin().to(dtype)
    return CosSin(torch.cat((cos, cos), -1)[:, None], torch.cat((-sin, sin), -1)[:, None])


def apply_rope(x_TNH: torch.Tensor, cos_sin: CosSin, direction: int = 1) -> torch.Tensor:
    """Queries or keys, rotated by their positions; direction -1 rotates back, which is also the gradient's way."""
    if x_TNH.requires_grad and torch.is_grad_enabled():
        return _ApplyRope.apply(x_TNH, cos_sin, direction)
    return _rotated(x_TNH, cos_sin, direction)


def apply_rope_to_both(
    q_TNH: torch.Tensor, k_TKH: torch.Tensor, cos_sin: CosSin, direction: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """`apply_rope` of queries and keys at once; for small tensors one copy takes less time than three more calls."""
    if q_TNH.numel() > LARGE:
        return apply_rope(q_TNH, cos_sin, direction), apply_rope(k_TKH, cos_sin, direction)
    both = apply_rope(torch.cat((q_TNH, k_TKH), 1), cos_sin, direction)
    queries = q_TNH.shape[1]
    return both[:, :queries], both[:, queries:]


def _rotated(x_TNH: torch.Tensor, cos_sin: CosSin, direction: int) -> torch.Tensor:
    cos, sin = cos_sin
    half = x_TNH.shape[-1] // 2
    if x_TNH.numel() <= LARGE:
        return torch.addcmul(x_TNH * cos, x_TNH.roll(half, -1), sin, value=direction)
    rotated = x_TNH * cos
    rotated[..., :half].addcmul_(x_TNH[..., half:], sin[..., :half], value=direction)
    rotated[..., half:].addcmul_(x_TNH[..., :half], sin[..., half:], value=direction)
    return rotated


class _RopeContext(NodeContext):
    cos_sin: CosSin
    direction: int


class _ApplyRope(torch.autograd.Function):
    """Keeps nothing of x: a rotation is orthogonal, so the gradient is rotated back."""

    @staticmethod
    def forward(ctx: _RopeContext, x: torch.Tensor, cos_sin: CosSin, direction: int) -> torch.Tensor:
        ctx.cos_sin, ctx.direction = cos_sin, direction
        return _rotated(x, cos_sin, direction)

    @staticmethod
    def backward(ctx: _RopeContext, *grads: torch.Tensor) -> Gradients:
        return _rotated(grads[0], ctx.cos_sin, -ctx.direction), None, None
