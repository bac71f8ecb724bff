"""A product whose weight is saved as itself, and the arithmetic of a gated MLP's inner half.

`linear` keeps the parameter itself, and no view of it, for the backward pass. torch's own linear saves the transposed
view, which would hold the full weight in memory after ZeRO-3 has partitioned the parameter again; DeepSpeed re-gathers
a parameter in place before its backward, so the parameter is what to keep.

The decoder's layers put their products and what surrounds them into one node each: `parallel/tensor/products.py`.

Shape suffixes: T tokens, D model width, F MLP width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from megatron_gemini.kernels.autograd import Gradients, NodeContext

_gelu_backward = torch.ops.aten.gelu_backward.grad_input
_silu_backward = torch.ops.aten.silu_backward.grad_input


def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [..., in], weight [out, in] -> [..., out]."""
    if x.dim() != 2:
        return _Linear.apply(x.flatten(0, -2), weight).unflatten(0, x.shape[:-1])
    return _Linear.apply(x, weight)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: NodeContext, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return torch.mm(x, weight.t())

    @staticmethod
    def backward(ctx: NodeContext, *grads: torch.Tensor) -> Gradients:
        x, weight = ctx.saved_tensors
        x_grad = torch.mm(grads[0], weight) if ctx.needs_input_grad[0] else None
        return x_grad, torch.mm(grads[0].t(), x) if ctx.needs_input_grad[1] else None


def gated_forward(
    x: torch.Tensor, weight: torch.Tensor, activation: str
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """(activation(x W_0^T) * (x W_1^T), what the backward needs): the inner half of a gated MLP."""
    # Two products instead of one of [2 F, D]: its halves would be strided, and the allocator's block twice as large.
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
    # Written over the gradient that goes in, which nobody reads again: [T, F] is the widest tensor of a layer.
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
