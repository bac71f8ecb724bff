"""Rotary position embedding (Su et al., 2021), in the half-split convention of Gemma: value i turns with value i + H/2.

Shape suffixes: T tokens, N heads, H head width.
"""

from __future__ import annotations

from typing import NamedTuple

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


def rotate(x_TNH: torch.Tensor, turn: Rotation, direction: int = 1) -> torch.Tensor:
    """Queries or keys, turned by their positions; direction -1 turns back, which is also the gradient's way."""
    cos, sin = turn
    return torch.addcmul(x_TNH * cos, x_TNH.roll(x_TNH.shape[-1] // 2, -1), sin, value=direction)


def rotate_both(
    q_TNH: torch.Tensor, k_TKH: torch.Tensor, turn: Rotation, direction: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """`rotate` of queries and keys at once; for small tensors one copy takes less time than three more calls."""
    both = rotate(torch.cat((q_TNH, k_TKH), 1), turn, direction)
    queries = q_TNH.shape[1]
    return both[:, :queries], both[:, queries:]
