"""Rotary position embedding (Su et al., 2021), in the half-split convention of Gemma: value i turns with value i + H/2.

Shape suffixes: T tokens, N query heads, K key heads, H head width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch


class Rotation(NamedTuple):
    """cos_T1H, and sin_T1H whose first half is negated: x turns into x * cos + (x with its halves swapped) * sin."""

    cos_T1H: torch.Tensor
    sin_T1H: torch.Tensor


def rotation(position_T: torch.Tensor, head_width: int, theta: float, dtype: torch.dtype) -> Rotation:
    """Angles position * theta^(-2i/H), once a microbatch for all layers. Computed in float32, returned in `dtype`."""
    exponent = torch.arange(0, head_width, 2, device=position_T.device, dtype=torch.float32) / head_width
    angle_TH = position_T[:, None].float() / theta**exponent
    cos, sin = angle_TH.cos(), angle_TH.sin()
    return Rotation(torch.cat((cos, cos), -1)[:, None].to(dtype), torch.cat((-sin, sin), -1)[:, None].to(dtype))


def rotate(q_TNH: torch.Tensor, k_TKH: torch.Tensor, turn: Rotation) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys, turned by their positions; same shapes and dtypes."""
    return _Rotate.apply(q_TNH, k_TKH, *turn)


def _turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, direction: int) -> torch.Tensor:
    return (x * cos).addcmul_(x.roll(x.shape[-1] // 2, -1), sin, value=direction)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(cos, sin)
        return _turn(q, cos, sin, 1), _turn(k, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        cos, sin = ctx.saved_tensors  # a rotation's transpose turns the other way
        return _turn(grads[0], cos, sin, -1), _turn(grads[1], cos, sin, -1), None, None
