"""Attention on CPU: RoPE, documents and torch's CPU flash attention as one autograd node.

Against `sdpa` this saves two dozen autograd nodes a layer and the slow backward of every view and gather.

Shape suffixes: T packed tokens, or in the cross form M memory embeddings; Q queries (T, or this rank's), S slots (see
`slot_mapping`), N query heads, K key/value heads, H head width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_gemini.kernels.attention.cpu.calls import attend_slots, attend_slots_backward, lse_gradients, saved_lse
from megatron_gemini.kernels.attention.plan import AttentionPlan
from megatron_gemini.kernels.attention.slot_mapping import to_rows, to_slots, without_repeats
from megatron_gemini.kernels.autograd import Gradients, NodeContext
from megatron_gemini.kernels.rope import CosSin


def attend_on_cpu(
    q_QNH: torch.Tensor,
    k_TKH: torch.Tensor,
    v_TKH: torch.Tensor,
    plan: AttentionPlan,
    scale: float | None,
    cos_sin: CosSin | None,
    *,
    with_lse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(out_QNH, and if asked for its log-sum-exp [Q, N]): see `api.attention`. Some query must see a key."""
    out, *lse = _Attention.apply(q_QNH, k_TKH, v_TKH, plan, scale, cos_sin, with_lse)
    return out, lse[0] if lse else None


class _AttentionContext(NodeContext):
    plan: AttentionPlan
    scale: float | None
    cos_sin: CosSin | None


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _AttentionContext,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        plan: AttentionPlan,
        scale: float | None,
        cos_sin: CosSin | None,
        with_lse: bool,
    ) -> tuple[torch.Tensor, ...]:
        out_QNH, saved = attend_forward(q, k, v, plan, scale, cos_sin)
        ctx.save_for_backward(*saved)
        ctx.plan, ctx.scale, ctx.cos_sin = plan, scale, cos_sin
        # An output whose gradient is not asked for then has None: zeros would cost a whole backward of their own.
        ctx.set_materialize_grads(False)
        if not with_lse:
            return (out_QNH,)
        documents = plan.documents
        lse_SN = saved_lse(saved, plan.cpu_calls, documents.query_slots)
        return out_QNH, to_rows(lse_SN, documents.queries, float("-inf"))

    @staticmethod
    def backward(ctx: _AttentionContext, *grads: torch.Tensor | None) -> Gradients:
        lse_grad = grads[1] if len(grads) > 1 else None
        return *attend_backward(grads[0], lse_grad, ctx.saved_tensors, ctx.plan, ctx.scale, ctx.cos_sin), *[None] * 4


def attend_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: AttentionPlan,
    scale: float | None,
    cos_sin: CosSin | None,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """(out_QNH, and what the backward needs)."""
    documents = plan.documents
    if cos_sin is not None:
        q, k = plan.apply_rope(q, k, cos_sin)
    inputs = (to_slots(q, documents.queries), to_slots(k, documents.keys), to_slots(v, documents.keys))
    out_SNH, saved = attend_slots(*inputs, plan.cpu_calls, scale)
    return to_rows(out_SNH, documents.queries), saved


def attend_backward(
    out_grad: torch.Tensor | None,
    lse_grad: torch.Tensor | None,
    saved: Sequence[torch.Tensor],
    plan: AttentionPlan,
    scale: float | None,
    cos_sin: CosSin | None,
) -> Gradients:
    """The gradients of q, k and v, given those of out_QNH and of its log-sum-exp; None where neither gives one."""
    documents = plan.documents
    grads: list[torch.Tensor | None] = [None, None, None]
    if out_grad is not None:
        grad_SNH = without_repeats(to_slots(out_grad, documents.queries), documents.queries)
        grads = list(attend_slots_backward(grad_SNH, documents.key_slots, saved, plan.cpu_calls, scale))
    if lse_grad is not None:
        grad_SN = without_repeats(to_slots(lse_grad, documents.queries), documents.queries)
        more = lse_gradients(grad_SN, documents.key_slots, saved, plan.cpu_calls, scale)
        grads[:2] = (new if old is None else old + new for old, new in zip(grads, more, strict=False))
    q_grad, k_grad, v_grad = (
        None if grad is None else to_rows(grad, slots)
        for grad, slots in zip(grads, (documents.queries, documents.keys, documents.keys), strict=True)
    )
    if cos_sin is not None and q_grad is not None and k_grad is not None:
        q_grad, k_grad = plan.apply_rope(q_grad, k_grad, cos_sin, -1)
    return q_grad, k_grad, v_grad
