"""Weighted cross-entropy with z-loss over a vocabulary that may be divided over ranks.

Shape suffixes: T tokens, V vocabulary rows of this rank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup


def cross_entropy(
    logits_TV: torch.Tensor,
    target_T: torch.Tensor,
    weight_T: torch.Tensor,
    *,
    z_loss: float,
    first: int,
    size: int,
    group: ProcessGroup | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum(weight * nll) + z_loss * sum(weight * lse^2), nll_T): the loss, and float32 figures without a gradient.

    logits_TV: of the ids first, first + 1, ...; ids from `size` on are padding and outside the softmax. lse is
    log(sum(exp(logits))), nll is lse - the target's logit; z-loss keeps the softmax's normaliser near 1 (PaLM, section
    5). group: ranks that hold the other ids, None if this one holds them all. float32 throughout, as its backward.
    """
    return _CrossEntropy.apply(logits_TV, target_T, weight_T, z_loss, first, size, group)


class _CrossEntropy(torch.autograd.Function):
    """The gradient is made in the forward, from the exponentials at hand, so the backward is one product."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        target: torch.Tensor,
        weight: torch.Tensor,
        z_loss: float,
        first: int,
        size: int,
        group: ProcessGroup | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        values, rows = logits.float(), logits.shape[-1]
        if first + rows > size:
            values = values.clone() if values is logits else values
            values[:, max(0, size - first) :] = -torch.inf
        largest = values.amax(-1, keepdim=True)
        if group is not None:
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        shifted = values - largest
        row, held = _local_rows(target, first, rows, group)
        target_logit = shifted.gather(1, row).squeeze(1)
        exponential = shifted.exp_()
        sums = torch.stack((exponential.sum(-1), target_logit))
        if held is not None:
            sums[1] *= held
            dist.all_reduce(sums, group=group)
        logarithm = sums[0].log()
        lse, nll = logarithm + largest.squeeze(1), logarithm - sums[1]
        loss = torch.dot(weight, nll + z_loss * lse.square() if z_loss else nll)
        if ctx.needs_input_grad[0]:
            scale = weight * (1 + 2 * z_loss * lse) if z_loss else weight
            grad = exponential.mul_((scale / sums[0]).unsqueeze_(1))
            grad.scatter_add_(1, row, -(weight if held is None else weight * held).unsqueeze(1))
            ctx.save_for_backward(grad.to(logits.dtype))
        ctx.mark_non_differentiable(nll)
        return loss, nll

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return grad * grads[0], None, None, None, None, None, None


def _local_rows(
    target: torch.Tensor, first: int, rows: int, group: ProcessGroup | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(row of every target [T, 1], whether this rank holds it; None if it holds every id)."""
    if group is None:
        return target.unsqueeze(1), None
    row = target - first
    held = (row >= 0) & (row < rows)
    return torch.where(held, row, 0).unsqueeze(1), held
