"""The autograd nodes of a decoder layer, with the collectives of its tensor-parallel ranks inside.

One node a residual half-branch. On small rows a step is mostly dispatch, and one node instead of three or four is most
of this model's advantage there (tools/bench/step.py). Collectives inside a node can also overlap with its products: the
input's gradient is reduced while the weights' gradients are computed. With sequence parallelism a node saves its rank's
stream only, and gathers it once more in the backward while the first product runs. One rank gathers and reduces
nothing, and its sum with the residual is part of the product.

The parameter itself is saved and no view of it. torch's own linear saves the transposed view, which would hold the full
weight in memory after ZeRO-3 has partitioned the parameter again. DeepSpeed re-gathers a parameter in place before its
backward, so the parameter is what to keep.

Here are the ends of both half-branches and the MLP. `attention_input.py` and `attention_output.py` have the others.

Shape suffixes: C tokens of this context rank, S tokens of this rank's stream, D model width, F this rank's share of the
inner width.
"""

from __future__ import annotations

import torch

from megatron_gemini.kernels.autograd import Gradients, NodeContext
from megatron_gemini.kernels.discarded_output import discarded_output, output_is_discarded
from megatron_gemini.kernels.linear import gated_backward, gated_forward, gated_weight_gradient
from megatron_gemini.kernels.norm import norm_backward, norm_forward
from megatron_gemini.parallel.collectives import TensorRanks


def project_add(x: torch.Tensor, weight: torch.Tensor, residual_SD: torch.Tensor, ranks: TensorRanks) -> torch.Tensor:
    """residual + the sum over ranks of x W^T: x [C, in] of this rank, or with `in` in several dimensions -> [S, D]."""
    return _ProjectAdd.apply(x, weight, residual_SD, ranks)


def gated_mlp(
    h_SD: torch.Tensor,
    norm_D: torch.Tensor,
    eps: float,
    gate_up_2FD: torch.Tensor,
    down_DF: torch.Tensor,
    activation: str,
    ranks: TensorRanks,
) -> torch.Tensor:
    """h + the sum over ranks of W_down (activation(W_0 n) * (W_1 n)), n = RMSNorm(h): the residual branch, [S, D].

    activation: "gelu" (its tanh form) or "silu".
    """
    return _GatedMLP.apply(h_SD, norm_D, eps, gate_up_2FD, down_DF, activation, ranks)


def add_product(
    residual_SD: torch.Tensor, x_CF: torch.Tensor, weight_DF: torch.Tensor, ranks: TensorRanks
) -> torch.Tensor:
    """residual + the sum over ranks of x W^T, or a stand-in for it where nobody reads the values."""
    if output_is_discarded():
        return discarded_output(residual_SD)
    if ranks.size == 1:  # one call and one new tensor instead of two
        return torch.addmm(residual_SD, x_CF, weight_DF.t())
    # Added behind the sum: before it the residual would count once for each rank.
    return ranks.reduce(torch.mm(x_CF, weight_DF.t())).wait().add_(residual_SD)


class LayerContext(NodeContext):
    ranks: TensorRanks


class _ProjectAdd(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: LayerContext, x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor, ranks: TensorRanks
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.ranks = ranks
        return add_product(residual, x.flatten(1), weight, ranks)

    @staticmethod
    def backward(ctx: LayerContext, *grads: torch.Tensor) -> Gradients:
        x, weight = ctx.saved_tensors
        whole = ctx.ranks.gather(grads[0]).wait()
        weight_grad = torch.mm(whole.t(), x.flatten(1)) if ctx.needs_input_grad[1] else None
        return torch.mm(whole, weight).view(x.shape), weight_grad, grads[0], None


class _GatedMLPContext(LayerContext):
    activation: str


class _GatedMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _GatedMLPContext,
        h: torch.Tensor,
        norm: torch.Tensor,
        eps: float,
        gate_up: torch.Tensor,
        down: torch.Tensor,
        activation: str,
        ranks: TensorRanks,
    ) -> torch.Tensor:
        normed, inverse, scale = norm_forward(h, norm, eps)
        inner, saved = gated_forward(ranks.gather(normed).wait(), gate_up, activation)
        # The rank's own `normed` and not the gathered one: 1/p of the memory for one more all-gather in the backward.
        ctx.save_for_backward(h, inverse, scale, normed, gate_up, inner, down, *saved)
        ctx.activation, ctx.ranks = activation, ranks
        return add_product(h, inner, down, ranks)

    @staticmethod
    def backward(ctx: _GatedMLPContext, *grads: torch.Tensor) -> Gradients:
        h, inverse, scale, normed, gate_up, inner, down, *saved = ctx.saved_tensors
        ranks, needs = ctx.ranks, ctx.needs_input_grad
        # Begun together: the second runs during the products that need the first alone.
        pending_grad, pending_whole = ranks.gather(grads[0]), ranks.gather(normed)
        grad = pending_grad.wait()
        down_grad = torch.mm(grad.t(), inner) if needs[4] else None
        inner_grad = torch.mm(grad, down)  # behind the other, so that it is still in cache for what follows
        normed_grad, halves = gated_backward(inner_grad, gate_up, saved, ctx.activation)
        pending = ranks.reduce(normed_grad)  # during the products for the weights' gradient
        whole = pending_whole.wait()
        gate_up_grad = gated_weight_gradient(halves, whole, gate_up) if needs[3] else None
        h_grad, norm_grad = norm_backward(pending.wait(), h, inverse, scale)
        # The residual's own gradient is this rank's stream, and is not summed over the ranks.
        return h_grad.add_(grads[0]), norm_grad, None, gate_up_grad, down_grad, None, None
