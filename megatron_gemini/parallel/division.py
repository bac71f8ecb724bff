"""How heads and vocabulary are divided over tensor-parallel ranks, in terms that serial and divided layers share.

Shape suffixes: T packed tokens, N query heads, K key/value heads, H head width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from megatron_gemini.kernels.attention import AttentionPlan

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, AttentionPlan], torch.Tensor]
"""Rotated q_TNH and k_TKH, v_TKH and the row's plan -> [T, N, H]."""


@dataclass(frozen=True)
class VocabularyShard:
    """Which ids this rank's logits are for: `first` to `first + rows`; those from `size` on are padding."""

    first: int
    rows: int
    size: int
    group: ProcessGroup | None


@dataclass(frozen=True)
class HeadShard:
    """This rank's share of the attention heads.

    query: query heads of this rank. key: key/value heads that its projection returns. used: the first and the number
        of those that its query heads read. group: ranks that hold the same key/value heads; None if no other does.
    """

    query: int
    key: int
    used: tuple[int, int]
    group: ProcessGroup | None

    def share(self, k_TKH: torch.Tensor, v_TKH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys and values for this rank's query heads.

        Where ranks hold the same heads, their gradients are summed here, on the small dK and dV, so that everything
        before (K norm, K/V weights) gets the complete gradient, the same on all ranks.
        """
        if self.group is not None:
            k_TKH, v_TKH = sum_gradient(self.group, k_TKH, v_TKH)
        if self.used[1] < self.key:
            k_TKH, v_TKH = k_TKH.narrow(1, *self.used), v_TKH.narrow(1, *self.used)
        return k_TKH, v_TKH


def sum_gradient(group: ProcessGroup, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The same tensors; their gradients are summed over the ranks of `group`, in one all-reduce."""
    return _SumGradient.apply(group, *tensors)


class _SumGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: ProcessGroup, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.group = group
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        flat = torch.cat([grad.reshape(-1) for grad in grads])
        dist.all_reduce(flat, group=ctx.group)
        pieces = flat.split([grad.numel() for grad in grads])
        return None, *(piece.view(grad.shape) for piece, grad in zip(pieces, grads, strict=True))
