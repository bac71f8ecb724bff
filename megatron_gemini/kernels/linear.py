"""Products with a weight, fused with what surrounds them in a transformer into one autograd node each.

They keep the parameter itself, and no view of it, for the backward pass. torch's own linear saves the transposed view,
which would hold the full weight in memory after ZeRO-3 has partitioned the parameter again; DeepSpeed re-gathers a
parameter in place before its backward, so the parameter is what to keep. One node instead of three or four also is
most of this model's advantage where small layers are bound by dispatch (tools/bench/step.py).

The same of layers that are divided over tensor-parallel ranks: `parallel/tensor/products.py`.

Shape suffixes: T tokens, D model width, F MLP width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed import ProcessGroup

from megatron_gemini.kernels.discarded_output import discarded_output, output_is_discarded
from megatron_gemini.kernels.norm import norm_backward, norm_forward

_gelu_backward = torch.ops.aten.gelu_backward.grad_input
_silu_backward = torch.ops.aten.silu_backward.grad_input


def linear(x: torch.Tensor, weight: torch.Tensor, group: ProcessGroup | None = None) -> torch.Tensor:
    """x [..., in], weight [..., out, in] (leading dimensions are stacked along the output) -> [..., stacked out].

    group: tensor-parallel ranks over which x's gradient is summed, while the weight's gradient is being computed.
    """
    if x.dim() != 2:
        return _Linear.apply(x.flatten(0, -2), weight, None, group).unflatten(0, x.shape[:-1])
    return _Linear.apply(x, weight, None, group)


def linear_add(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """residual [T, out] + x W^T, x [T, in] or with `in` in several dimensions, as [T, N, H]."""
    return _Linear.apply(x, weight, residual, None)


def norm_linear(
    x_TD: torch.Tensor, norm_D: torch.Tensor, eps: float, head_width: int, weights: tuple[torch.Tensor, ...]
) -> tuple[torch.Tensor, ...]:
    """RMSNorm, then the product with each weight, cut into heads of `head_width` H.

    A weight [heads * H, D] gives [T, heads, H]; one of [parts, heads * H, D] gives `parts` of them.
    """
    return _NormLinear.apply(x_TD, norm_D, eps, head_width, *weights)


def gated_mlp(
    h_TD: torch.Tensor,
    norm_D: torch.Tensor,
    eps: float,
    gate_up_2FD: torch.Tensor,
    down_DF: torch.Tensor,
    activation: str,
) -> torch.Tensor:
    """h + W_down (activation(W_0 n) * (W_1 n)) with n = RMSNorm(h): the whole residual branch."""
    return _GatedMLP.apply(h_TD, norm_D, eps, gate_up_2FD, down_DF, activation)


def _matrix(weight: torch.Tensor) -> torch.Tensor:
    return weight if weight.dim() == 2 else weight.flatten(0, -2)


def _weight_gradient(grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    product = torch.mm(grad.t(), x)
    return product if weight.dim() == 2 else product.view(weight.shape)


def _gradients(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, group: ProcessGroup | None, needs: tuple[bool, ...]
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
        if output_is_discarded():
            return discarded_output(residual)
        return torch.addmm(residual, x if x.dim() == 2 else x.flatten(1), weight.t())

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,) = grads
        x, weight = ctx.saved_tensors
        needs = ctx.needs_input_grad
        if x.dim() == 2:
            x_grad, weight_grad = _gradients(grad, x, weight, ctx.group, needs)
        else:
            x_grad, weight_grad = _gradients(grad, x.flatten(1), weight, ctx.group, needs)
            x_grad = None if x_grad is None else x_grad.view(x.shape)
        return x_grad, weight_grad, grad if needs[2] else None, None


class _NormLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, norm: torch.Tensor, eps: float, head_width: int, *weights: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        normed, inverse, scale = norm_forward(x, norm, eps)
        ctx.save_for_backward(x, inverse, scale, normed, *weights)
        outs: list[torch.Tensor] = []
        for weight in weights:
            out = torch.mm(normed, _matrix(weight).t())
            if weight.dim() == 2:
                outs.append(out.view(x.shape[0], -1, head_width))
            else:
                outs.extend(out.view(x.shape[0], weight.shape[0], -1, head_width).unbind(1))
        return tuple(outs)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, inverse, scale, normed, *weights = ctx.saved_tensors
        normed_grad, taken = None, 0
        weight_grads: list[torch.Tensor | None] = []
        for weight, needed in zip(weights, ctx.needs_input_grad[4:], strict=True):
            parts = 1 if weight.dim() == 2 else weight.shape[0]
            grad = grads[taken] if parts == 1 else torch.cat(grads[taken : taken + parts], 1)
            grad = grad.reshape(x.shape[0], -1)
            taken += parts
            if normed_grad is None:
                normed_grad = torch.mm(grad, _matrix(weight))
            else:
                normed_grad.addmm_(grad, _matrix(weight))
            weight_grads.append(_weight_gradient(grad, normed, weight) if needed else None)
        assert normed_grad is not None
        return *norm_backward(normed_grad, x, inverse, scale), None, None, *weight_grads


def gated_forward(
    x: torch.Tensor, weight: torch.Tensor, activation: str
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """(activation(x W_0^T) * (x W_1^T), what the backward needs): the inner half of a gated MLP."""
    gate_weight, up_weight = weight.unbind(0)
    gate, up = torch.mm(x, gate_weight.t()), torch.mm(x, up_weight.t())
    active = F.gelu(gate, approximate="tanh") if activation == "gelu" else F.silu(gate)
    return active * up, (gate, up, active)


def gated_backward(
    grad: torch.Tensor, weight: torch.Tensor, saved: Sequence[torch.Tensor], activation: str
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """(x's gradient, those of x W_0^T and x W_1^T for `gated_weight_gradient`)."""
    gate, up, active = saved
    up_grad, gate_grad = grad * active, grad * up
    if activation == "gelu":
        _gelu_backward(gate_grad, gate, approximate="tanh", grad_input=gate_grad)
    else:
        _silu_backward(gate_grad, gate, grad_input=gate_grad)
    gate_weight, up_weight = weight.unbind(0)
    return torch.mm(gate_grad, gate_weight).addmm_(up_grad, up_weight), (gate_grad, up_grad)


def gated_weight_gradient(
    grads: tuple[torch.Tensor, torch.Tensor], x: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor:
    weight_grad = torch.empty_like(weight)
    for part, grad in zip(weight_grad.unbind(0), grads, strict=True):
        torch.mm(grad.t(), x, out=part)
    return weight_grad


class _GatedMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        h: torch.Tensor,
        norm: torch.Tensor,
        eps: float,
        gate_up: torch.Tensor,
        down: torch.Tensor,
        activation: str,
    ) -> torch.Tensor:
        normed, inverse, scale = norm_forward(h, norm, eps)
        inner, saved = gated_forward(normed, gate_up, activation)
        ctx.save_for_backward(h, inverse, scale, normed, gate_up, inner, down, *saved)
        ctx.activation = activation
        if output_is_discarded():
            return discarded_output(h)
        return torch.addmm(h, inner, down.t())

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,) = grads
        h, inverse, scale, normed, gate_up, inner, down, *saved = ctx.saved_tensors
        needs = ctx.needs_input_grad
        down_grad = _weight_gradient(grad, inner, down) if needs[4] else None
        inner_grad = torch.mm(grad, down)
        normed_grad, halves = gated_backward(inner_grad, gate_up, saved, ctx.activation)
        gate_up_grad = gated_weight_gradient(halves, normed, gate_up) if needs[3] else None
        h_grad, norm_grad = norm_backward(normed_grad, h, inverse, scale)
        return h_grad.add_(grad), norm_grad, None, gate_up_grad, down_grad, None
