"""Attention of one packed row, document by document: nothing is computed across documents.

Two forms: the row's tokens attend to each other (`plan_attention`), or to memory embeddings that are not tokens of the
row (`plan_cross_attention`).

Shape suffixes: T packed tokens, or in the cross form the M memory embeddings; Q queries (all tokens, or this
context-parallel rank's), N query heads, K key/value heads, H head width.
"""

from __future__ import annotations

import torch

from megatron_gemini.kernels.attention.dispatch import AttentionRequest, choose_backend
from megatron_gemini.kernels.attention.merge import merge_attention
from megatron_gemini.kernels.attention.plan import (
    AttentionPlan,
    CrossAttentionPlan,
    plan_attention,
    plan_cross_attention,
)
from megatron_gemini.kernels.rope import CosSin

__all__ = [
    "AttentionPlan",
    "attention",
    "attention_backend",
    "attention_with_lse",
    "check_attention",
    "merge_attention",
    "plan_attention",
    "plan_cross_attention",
]


def attention(
    q_QNH: torch.Tensor,
    k_TKH: torch.Tensor,
    v_TKH: torch.Tensor,
    plan: AttentionPlan,
    scale: float | None = None,
    cos_sin: CosSin | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """softmax(q k^T * scale) v within documents, by the rule that the plan was made with; [Q, N, H].

    The queries are the row's tokens that the plan was made for, all T of them by default. Keys and values are always
    the whole row's, or all the memory. Their gradients are what these queries give: ranks that divide the queries sum
    them. A query that sees nothing, such as one of padding, has the output 0 and the gradient 0.

    K divides N: query head n reads key/value head n // (N // K).
    scale: above 0, 1/sqrt(H) if None.
    cos_sin: rotates queries and keys first (RoPE); it is for the whole row, and queries that are only some of it take
        the rotations of their tokens. None in the cross form, where keys have no place in the row.
    backend: a name of `dispatch.BACKENDS`; the first able one if None.

    Raises ValueError for shapes, dtypes and devices that do not fit each other or the plan.
    """
    return _attend(q_QNH, k_TKH, v_TKH, plan, scale, cos_sin, backend, with_lse=False)[0]


def attention_with_lse(
    q_QNH: torch.Tensor,
    k_TKH: torch.Tensor,
    v_TKH: torch.Tensor,
    plan: AttentionPlan,
    scale: float | None = None,
    cos_sin: CosSin | None = None,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(`attention`, log(sum(exp(q k^T * scale))) as float32 [Q, N]): for `merge_attention`. -inf: nothing is seen.

    Both are differentiable.
    """
    out, lse = _attend(q_QNH, k_TKH, v_TKH, plan, scale, cos_sin, backend, with_lse=True)
    assert lse is not None, "the backend said that it gives the log-sum-exp"
    return out, lse


def attention_backend(
    device: torch.device, dtype: torch.dtype = torch.bfloat16, head_width: int = 128
) -> tuple[str, str]:
    """The implementation that `attention` takes on `device`, and why, for the run's first log lines.

    It is that of rows with images, which not every backend can do; text alone may take another.
    """
    backend = choose_backend(AttentionRequest(device, dtype, head_width, sequences=False, with_lse=False))
    return backend.name, backend.why


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: AttentionPlan,
    scale: float | None,
    cos_sin: CosSin | None,
    name: str | None,
    with_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    check_attention(q, k, v, plan, scale, cos_sin)
    request = AttentionRequest(
        q.device, q.dtype, q.shape[2], plan.sequences is not None, with_lse, isinstance(plan, CrossAttentionPlan)
    )
    backend = choose_backend(request, name)
    if plan.empty:
        # A row of padding, or a context rank whose chunk is padding. The graph stays whole, with gradients of zero: the
        # ranks of a step run the same backward, with its collectives.
        out = torch.zeros_like(q) + 0 * (q.sum() + k.sum() + v.sum())
        return out, out.float().sum(-1) + float("-inf") if with_lse else None
    return backend.attend(q, k, v, plan, scale, cos_sin, with_lse=with_lse)


def check_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: AttentionPlan,
    scale: float | None,
    cos_sin: CosSin | None,
) -> None:
    """Raises ValueError for what would give a wrong result, or an error far from its cause."""
    # The Triton kernels read by pointer: keys that are too few would be read past their end.
    for name, x in (("q_QNH", q), ("k_TKH", k)):
        if x.dim() != 3:
            raise ValueError(f"{name} has shape {list(x.shape)}; it is [tokens, heads, head width]")
    keys, heads, kv_heads, width = plan.keys, q.shape[1], k.shape[1], q.shape[2]
    if k.shape != (keys, kv_heads, width) or v.shape != k.shape:
        raise ValueError(
            f"k_TKH has shape {list(k.shape)} and v_TKH {list(v.shape)}; for q_QNH {list(q.shape)} and a plan of "
            f"{keys} keys both are [{keys}, K, {width}]"
        )
    if q.shape[0] != plan.queries:
        raise ValueError(f"q_QNH has {q.shape[0]} queries and the plan {plan.queries}; make the plan for these queries")
    if not kv_heads or heads % kv_heads:
        raise ValueError(
            f"q_QNH has {heads} heads and k_TKH {kv_heads}; the number of key/value heads divides the other"
        )
    if not q.dtype == k.dtype == v.dtype or not q.dtype.is_floating_point:
        raise ValueError(f"q_QNH is {q.dtype}, k_TKH {k.dtype} and v_TKH {v.dtype}; they have one floating-point dtype")
    if not q.device == k.device == v.device == plan.segment_T.device:
        raise ValueError(
            f"q_QNH is on {q.device}, k_TKH on {k.device}, v_TKH on {v.device} and the plan on "
            f"{plan.segment_T.device}; they belong on one device"
        )
    if scale is not None and not 0 < scale < float("inf"):
        raise ValueError(f"scale is {scale}; it is a finite number above 0")
    if cos_sin is None:
        return
    if isinstance(plan, CrossAttentionPlan):
        raise ValueError(f"cos_sin is for {len(cos_sin.cos_T1H)} positions, but memory has none in the row; pass None")
    if cos_sin.cos_T1H.shape != (keys, 1, width):
        raise ValueError(
            f"cos_sin has shape {list(cos_sin.cos_T1H.shape)}; a plan of {keys} tokens and heads of {width} want "
            f"[{keys}, 1, {width}], the rotations of the whole row"
        )
