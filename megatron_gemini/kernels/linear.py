"""y = x W^T that keeps the parameter itself, and no view of it, for the backward pass.

torch's own linear saves the transposed view, which would hold the full weight in memory after ZeRO-3 has partitioned
the parameter again. DeepSpeed re-gathers a parameter in place before its backward, so the parameter is what to keep.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup


def linear(x: torch.Tensor, weight: torch.Tensor, group: ProcessGroup | None = None) -> torch.Tensor:
    """x [..., in], weight [..., out, in] (leading dimensions are stacked along the output) -> [..., stacked out].

    group: tensor-parallel ranks over which x's gradient is summed, while the weight's gradient is being computed.
    """
    return _Linear.apply(x, weight, group)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, group: ProcessGroup | None) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.group = group
        return torch.matmul(x, weight.flatten(0, -2).t())

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,) = grads
        x, weight = ctx.saved_tensors
        x_grad = weight_grad = pending = None
        if ctx.needs_input_grad[0]:
            x_grad = torch.matmul(grad, weight.flatten(0, -2))
            if ctx.group is not None:
                pending = dist.all_reduce(x_grad, group=ctx.group, async_op=True)
        if ctx.needs_input_grad[1]:
            weight_grad = torch.mm(grad.flatten(0, -2).t(), x.flatten(0, -2)).view_as(weight)
        if pending is not None:
            pending.wait()
        return x_grad, weight_grad, None
