"""Attention over one packed row, document by document: nothing is computed across documents. The one dispatch point.

Shape suffixes: T packed tokens, Q queries (T, or this context-parallel rank's), N query heads, K key/value heads, H
head width.
"""

from __future__ import annotations

import torch

from megatron_gemini.kernels.attention_cpu import attend_and_project_on_cpu, attend_on_cpu
from megatron_gemini.kernels.attention_merge import merge_attention
from megatron_gemini.kernels.attention_plan import AttentionPlan, plan_attention
from megatron_gemini.kernels.attention_sdpa import attend_by_sdpa
from megatron_gemini.kernels.linear import linear_add
from megatron_gemini.kernels.rope import Rotation

__all__ = [
    "AttentionPlan",
    "attention",
    "attention_backend",
    "attention_output",
    "attention_with_lse",
    "merge_attention",
    "plan_attention",
]


def attention(
    q_QNH: torch.Tensor,
    k_TKH: torch.Tensor,
    v_TKH: torch.Tensor,
    plan: AttentionPlan,
    scale: float | None = None,
    turn: Rotation | None = None,
) -> torch.Tensor:
    """softmax(q k^T * scale) v within documents, by the mask rule of `contracts.Batch`; [Q, N, H], padding rows are 0.

    The queries are the row's tokens that the plan was made for, all T of them by default; keys and values are always
    the whole row's, and their gradients are what these queries give: ranks that divide the queries sum them.
    scale: 1/sqrt(H) if None. turn: rotates queries and keys first (RoPE); it is for the whole row, and queries that are
    only some of it take the rotations of their tokens. K divides N: query head n reads key/value head n // (N // K).
    """
    if plan.documents.empty:
        return _nothing(q_QNH, k_TKH, v_TKH)
    if q_QNH.device.type == "cpu":
        return attend_on_cpu(q_QNH, k_TKH, v_TKH, plan, scale, turn)[0]
    return attend_by_sdpa(q_QNH, k_TKH, v_TKH, plan, scale, turn)


def attention_with_lse(
    q_QNH: torch.Tensor,
    k_TKH: torch.Tensor,
    v_TKH: torch.Tensor,
    plan: AttentionPlan,
    scale: float | None = None,
    turn: Rotation | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(`attention`, log(sum(exp(q k^T * scale))) as float32 [Q, N], -inf for padding): for `merge_attention`.

    Both are differentiable.
    """
    if plan.documents.empty:
        out = _nothing(q_QNH, k_TKH, v_TKH)
        return out, out.float().sum(-1) + float("-inf")
    out, lse = attend_on_cpu(q_QNH, k_TKH, v_TKH, plan, scale, turn, with_lse=True)
    return out, lse


def _nothing(*inputs: torch.Tensor) -> torch.Tensor:
    """Zeros like the queries, for a row of padding: the graph stays whole, with gradients of zero."""
    return torch.zeros_like(inputs[0]) + 0 * sum(x.sum() for x in inputs)


def attention_output(
    q_QNH: torch.Tensor,
    k_TKH: torch.Tensor,
    v_TKH: torch.Tensor,
    plan: AttentionPlan,
    turn: Rotation,
    weight: torch.Tensor,
    residual_QD: torch.Tensor,
) -> torch.Tensor:
    """residual + attention(q, k, v) W^T with W [D, N H]: the end of a residual branch, one autograd node on CPU."""
    if q_QNH.device.type == "cpu" and not plan.documents.empty:
        return attend_and_project_on_cpu(q_QNH, k_TKH, v_TKH, plan, turn, weight, residual_QD)
    return linear_add(attention(q_QNH, k_TKH, v_TKH, plan, turn=turn), weight, residual_QD)


def attention_backend(device: torch.device) -> tuple[str, str]:
    """The implementation that `attention` takes on `device`, and why, for the run's first log lines."""
    if device.type == "cpu":
        return "torch's CPU flash attention", "RoPE, buckets and attention are one autograd node"
    return "torch SDPA", f"documents of similar length share a call; no kernel of our own for {device.type} yet"
