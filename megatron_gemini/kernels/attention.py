"""Attention over one packed row, document by document: nothing is computed across documents. The one dispatch point.

Shape suffixes: T packed tokens, N query heads, K key/value heads, H head width.
"""

from __future__ import annotations

import torch

from megatron_gemini.kernels.attention_cpu import attend_and_project_on_cpu, attend_on_cpu
from megatron_gemini.kernels.attention_plan import AttentionPlan, plan_attention
from megatron_gemini.kernels.attention_sdpa import attend_by_sdpa
from megatron_gemini.kernels.linear import linear_add
from megatron_gemini.kernels.rope import Rotation

__all__ = ["AttentionPlan", "attention", "attention_backend", "attention_output", "plan_attention"]


def attention(
    q_TNH: torch.Tensor,
    k_TKH: torch.Tensor,
    v_TKH: torch.Tensor,
    plan: AttentionPlan,
    scale: float | None = None,
    turn: Rotation | None = None,
) -> torch.Tensor:
    """softmax(q k^T * scale) v within documents, by the mask rule of `contracts.Batch`; [T, N, H], padding rows are 0.

    scale: 1/sqrt(H) if None. turn: rotates queries and keys first (RoPE). K divides N: query head n reads key/value
    head n // (N // K).
    """
    if plan.real == 0:  # the graph stays whole, with gradients of zero
        return torch.zeros_like(q_TNH) + 0 * (q_TNH.sum() + k_TKH.sum() + v_TKH.sum())
    if q_TNH.device.type == "cpu":
        return attend_on_cpu(q_TNH, k_TKH, v_TKH, plan, scale, turn)
    return attend_by_sdpa(q_TNH, k_TKH, v_TKH, plan, scale, turn)


def attention_output(
    q_TNH: torch.Tensor,
    k_TKH: torch.Tensor,
    v_TKH: torch.Tensor,
    plan: AttentionPlan,
    turn: Rotation,
    weight: torch.Tensor,
    residual_TD: torch.Tensor,
) -> torch.Tensor:
    """residual + attention(q, k, v) W^T with W [D, N H]: the end of a residual branch, one autograd node on CPU."""
    if plan.real and q_TNH.device.type == "cpu":
        return attend_and_project_on_cpu(q_TNH, k_TKH, v_TKH, plan, turn, weight, residual_TD)
    return linear_add(attention(q_TNH, k_TKH, v_TKH, plan, turn=turn), weight, residual_TD)


def attention_backend(device: torch.device) -> tuple[str, str]:
    """The implementation that `attention` takes on `device`, and why, for the run's first log lines."""
    if device.type == "cpu":
        return "torch's CPU flash attention", "RoPE, buckets and attention are one autograd node"
    return "torch SDPA", f"documents of similar length share a call; no kernel of our own for {device.type} yet"
