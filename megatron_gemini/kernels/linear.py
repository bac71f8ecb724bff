"""Products with a weight, fused with what surrounds them in a transformer into one autograd node each.

They keep the parameter itself, and no view of it, for the backward pass. torch's own linear saves the transposed view,
which would hold the full weight in memory after ZeRO-3 has partitioned the parameter again; DeepSpeed re-gathers a
parameter in place before its backward, so the parameter is what to keep. One node instead of three or four also is
most of this model's advantage where small layers are bound by dispatch (tools/bench/step.py).

`group`, wherever it is asked for: tensor-parallel ranks over which the input's gradient is summed, while the weight's
gradient is being computed. Shape suffixes: T tokens, D model width, F MLP width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from megatron_gemini.kernels.norm import norm_backward, norm_forward

aten = torch.ops.aten


def linear(x: torch.Tensor, weight: torch.Tensor, group: ProcessGroup | None = None) -> torch.Tensor:
    """x [..., in], weight [..., out, in] (leading dimensions are stacked along the output) -> [..., stacked out]."""
    if x.dim() != 2:
        return _Linear.apply(x.flatten(0, -2), weight, None, group).unflatten(0, x.shape[:-1])
    return _Linear.apply(x, weight, None, group)


def linear_add(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """residual [T, out] + x [T, in] W^T."""
    return _Linear.apply(x, weight, residual, None)


def norm_linear(
    x_TD: torch.Tensor, norm_D: torch.Tensor, eps: float, weights: tuple[torch.Tensor, ...]
) -> tuple[torch.Tensor, ...]:
    """RMSNorm, then the product with each weight: [out, D] gives [T, out]; [parts, out, D] gives `parts` of them."""
    return _NormLinear.apply(x_TD, norm_D, eps, *weights)


def gated_linear(
    x_TD: torch.Tensor, weight_2FD: torch.Tensor, activation: str, group: ProcessGroup | None = None
) -> torch.Tensor:
    """activation(x W_0^T) * (x W_1^T) -> [T, F], the inner half of a gated MLP (Shazeer, 2020).

    activation: "gelu" (tanh approximation) or "silu".
    """
    return _GatedLinear.apply(x_TD, None, 0.0, weight_2FD, activation, group)


def norm_gated_linear(
    x_TD: torch.Tensor, norm_D: torch.Tensor, eps: float, weight_2FD: torch.Tensor, activation: str
) -> torch.Tensor:
    """RMSNorm, then `gated_linear`."""
    return _GatedLinear.apply(x_TD, norm_D, eps, weight_2FD, activation, None)


def _matrix(weight: torch.Tensor) -> torch.Tensor:
    return weight if weight.dim() == 2 else weight.flatten(0, -2)


def _weight_gradient(grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    product = torch.mm(grad.t(), x)
    return product if weight.dim() == 2 else product.view(weight.shape)


def _gradients(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, group: ProcessGroup | None, needs: tuple[bool, bool]
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(x's gradient, weight's gradient) of x W^T, those that are needed."""
    x_grad = weight_grad = pending = None
    if needs[0]:
        x_grad = torch.mm(grad, _matrix(weight))
        if group is not None:
            pending = dist.all_reduce(x_grad, group=group, async_op=True)
    if needs[1]:
        weight_grad = _weight_gradient(grad, x, weight)
    if pending is not None:
        pending.wait()
    return x_grad, weight_grad


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        residual: torch.Tensor | None,
        group: ProcessGroup | None,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.group = group
        if residual is None:
            return torch.mm(x, _matrix(weight).t())
        return torch.addmm(residual, x, weight.t())

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,) = grads
        needs = ctx.needs_input_grad
        return *_gradients(grad, *ctx.saved_tensors, ctx.group, needs[:2]), grad if needs[2] else None, None


class _NormLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, norm: torch.Tensor, eps: float, *weights: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        normed, inverse, scale = norm_forward(x, norm, eps)
        ctx.save_for_backward(x, inverse, scale, normed, *weights)
        outs: list[torch.Tensor] = []
        for weight in weights:
            out = torch.mm(normed, _matrix(weight).t())
            outs.extend((out,) if weight.dim() == 2 else out.chunk(len(weight), 1))
        return tuple(outs)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, inverse, scale, normed, *weights = ctx.saved_tensors
        remaining = list(grads)
        normed_grad = None
        weight_grads: list[torch.Tensor | None] = []
        for weight, needed in zip(weights, ctx.needs_input_grad[3:], strict=True):
            parts = 1 if weight.dim() == 2 else len(weight)
            grad = remaining[0] if parts == 1 else torch.cat(remaining[:parts], 1)
            del remaining[:parts]
            if normed_grad is None:
                normed_grad = torch.mm(grad, _matrix(weight))
            else:
                normed_grad.addmm_(grad, _matrix(weight))
            weight_grads.append(_weight_gradient(grad, normed, weight) if needed else None)
        assert normed_grad is not None
        return *norm_backward(normed_grad, x, inverse, scale), None, *weight_grads


class _GatedLinear(torch.autograd.Function):
    """With a norm before it where `norm` is given."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        norm: torch.Tensor | None,
        eps: float,
        weight: torch.Tensor,
        activation: str,
        group: ProcessGroup | None,
    ) -> torch.Tensor:
        normed, *saved = (x,) if norm is None else norm_forward(x, norm, eps)
        both = torch.mm(normed, _matrix(weight).t())
        gate, up = both.chunk(2, 1)
        active = aten.gelu(gate, approximate="tanh") if activation == "gelu" else aten.silu(gate)
        ctx.save_for_backward(weight, both, active, normed, x, *saved)
        ctx.activation, ctx.group = activation, group
        return active * up

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,) = grads
        weight, both, active, normed, x, *saved = ctx.saved_tensors
        gate, up = both.chunk(2, 1)
        both_grad = torch.empty_like(both)  # one tensor for both halves, instead of padding and adding theirs
        gate_grad, up_grad = both_grad.chunk(2, 1)
        torch.mul(grad, active, out=up_grad)
        if ctx.activation == "gelu":
            aten.gelu_backward.grad_input(grad * up, gate, approximate="tanh", grad_input=gate_grad)
        else:
            aten.silu_backward.grad_input(grad * up, gate, grad_input=gate_grad)
        needs = ctx.needs_input_grad
        x_grad, weight_grad = _gradients(both_grad, normed, weight, ctx.group, (needs[0] or needs[1], needs[3]))
        norm_grad = None
        if saved and x_grad is not None:
            x_grad, norm_grad = norm_backward(x_grad, x, *saved)
        return x_grad, norm_grad, None, weight_grad, None, None
