"""The gated activation of the MLP (Shazeer, 2020): activation(gate) * up. F is the MLP width."""

from __future__ import annotations

from typing import Any

import torch

aten = torch.ops.aten


def gated(gate_up: torch.Tensor, activation: str) -> torch.Tensor:
    """[..., 2F], gate and then up, -> [..., F]. activation: "gelu" (tanh approximation) or "silu".

    One autograd node: the two halves' gradients are written into one tensor instead of being padded and added.
    """
    return _Gated.apply(gate_up, activation)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: torch.Tensor, activation: str) -> torch.Tensor:
        gate, up = gate_up.chunk(2, -1)
        active = aten.gelu(gate, approximate="tanh") if activation == "gelu" else aten.silu(gate)
        ctx.save_for_backward(gate_up, active)
        ctx.activation = activation
        return active * up

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,) = grads
        gate_up, active = ctx.saved_tensors
        gate, up = gate_up.chunk(2, -1)
        out = torch.empty_like(gate_up)
        gate_grad, up_grad = out.chunk(2, -1)
        torch.mul(grad, active, out=up_grad)
        through = grad * up
        if ctx.activation == "gelu":
            aten.gelu_backward.grad_input(through, gate, approximate="tanh", grad_input=gate_grad)
        else:
            aten.silu_backward.grad_input(through, gate, grad_input=gate_grad)
        return out, None
