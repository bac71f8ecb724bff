"""Attention as its definition says it, with the whole mask: the reference of every backend. For tests only.

Shape suffixes: T packed tokens, or in the cross form M memory embeddings; Q queries (T, or this rank's), N query heads,
K key/value heads, H head width.
"""

from __future__ import annotations

import torch

from megatron_gemini.kernels.attention.plan import AttentionPlan, CrossAttentionPlan, SelfAttentionPlan


def visible(plan: AttentionPlan) -> torch.Tensor:
    """bool [Q, keys]: whether a query sees a key, as `contracts.Batch` and `plan.plan_cross_attention` word it."""
    segment = plan.segment_T
    place = torch.arange(plan.tokens, device=segment.device)
    query = place if plan.query_Q is None else plan.query_Q
    real = segment[query, None] != 0
    if isinstance(plan, CrossAttentionPlan):
        return real & (segment[query, None] == plan.segment_M) & (plan.after_M <= query[:, None])
    assert isinstance(plan, SelfAttentionPlan)
    span = plan.span_T
    same_span = (span[query, None] == span) & (span[query, None] != 0)
    return real & (segment[query, None] == segment) & ((place <= query[:, None]) | same_span)


def attend_densely(
    q_QNH: torch.Tensor, k_TKH: torch.Tensor, v_TKH: torch.Tensor, plan: AttentionPlan, scale: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out_QNH, lse_QN), both in the dtype of the inputs; differentiable. See `api.attention_with_lse`."""
    scale = q_QNH.shape[-1] ** -0.5 if scale is None else scale
    repeats = q_QNH.shape[1] // k_TKH.shape[1]
    k_TNH, v_TNH = k_TKH.repeat_interleave(repeats, 1), v_TKH.repeat_interleave(repeats, 1)
    hidden = ~visible(plan)
    score = torch.einsum("inh,jnh->nij", q_QNH, k_TNH) * scale
    nothing = hidden.all(-1)
    score = score.masked_fill(hidden & ~nothing[:, None], float("-inf"))  # a row of -inf alone would give NaN gradients
    weight = torch.softmax(score, -1).masked_fill(hidden, 0.0)
    lse_NQ = torch.logsumexp(score, -1).masked_fill(nothing, float("-inf"))
    return torch.einsum("nij,jnh->inh", weight, v_TNH), lse_NQ.transpose(0, 1)
