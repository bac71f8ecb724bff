"""The end of a layer's attention: RoPE, attention itself, the output projection and the residual.

Shape suffixes: T tokens of the row, C tokens of this context rank, S tokens of this rank's stream, D model width,
N query heads of this rank, K key/value heads that they read, H head width.
"""

from __future__ import annotations

import torch

from megatron_gemini.kernels.attention.api import AttentionPlan, attention, check_attention
from megatron_gemini.kernels.attention.cpu.node import attend_backward, attend_forward
from megatron_gemini.kernels.autograd import Gradients
from megatron_gemini.kernels.rope import CosSin
from megatron_gemini.parallel.collectives import TensorRanks
from megatron_gemini.parallel.tensor.products import LayerContext, add_product, project_add


def attention_output(
    q_CNH: torch.Tensor,
    k_TKH: torch.Tensor,
    v_TKH: torch.Tensor,
    plan: AttentionPlan,
    cos_sin: CosSin,
    weight: torch.Tensor,
    residual_SD: torch.Tensor,
    ranks: TensorRanks,
) -> torch.Tensor:
    """residual + the sum over ranks of attention(q, k, v) W^T with W [D, N H]: [S, D]; one autograd node on CPU.

    Raises what `attention` raises.
    """
    # A row of padding has no call of the CPU's kernel, and its gradients are zeros all the same.
    if q_CNH.device.type == "cpu" and not plan.empty:
        check_attention(q_CNH, k_TKH, v_TKH, plan, None, cos_sin)
        return _AttentionOutput.apply(q_CNH, k_TKH, v_TKH, weight, residual_SD, plan, cos_sin, ranks)
    return project_add(attention(q_CNH, k_TKH, v_TKH, plan, cos_sin=cos_sin), weight, residual_SD, ranks)


class _AttentionOutputContext(LayerContext):
    plan: AttentionPlan
    cos_sin: CosSin
    shape: torch.Size


class _AttentionOutput(torch.autograd.Function):
    """RoPE, attention and `project_add` as one, without the nodes and views between them that small rows pay for."""

    @staticmethod
    def forward(
        ctx: _AttentionOutputContext,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        weight: torch.Tensor,
        residual: torch.Tensor,
        plan: AttentionPlan,
        cos_sin: CosSin,
        ranks: TensorRanks,
    ) -> torch.Tensor:
        out_CNH, saved = attend_forward(q, k, v, plan, None, cos_sin)
        out = out_CNH.flatten(1)
        ctx.save_for_backward(weight, out, *saved)
        ctx.plan, ctx.cos_sin, ctx.shape, ctx.ranks = plan, cos_sin, out_CNH.shape, ranks
        return add_product(residual, out, weight, ranks)

    @staticmethod
    def backward(ctx: _AttentionOutputContext, *grads: torch.Tensor) -> Gradients:
        weight, out, *saved = ctx.saved_tensors
        whole = ctx.ranks.gather(grads[0]).wait()
        weight_grad = torch.mm(whole.t(), out) if ctx.needs_input_grad[3] else None
        out_grad = torch.mm(whole, weight).view(ctx.shape)
        of_inputs = attend_backward(out_grad, None, saved, ctx.plan, None, ctx.cos_sin)
        return *of_inputs, weight_grad, grads[0], None, None, None
