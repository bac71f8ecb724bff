"""Attention on CPU: RoPE, buckets and torch's CPU flash attention as one autograd node.

Against `attention_sdpa` this saves two dozen autograd nodes a layer and the slow backward of every view and gather.

Shape suffixes: T packed tokens, S slots of all buckets, N query heads, K key/value heads, H head width.
"""

from __future__ import annotations

from typing import Any

import torch

from megatron_gemini.kernels.attention_plan import AttentionPlan, Bucket
from megatron_gemini.kernels.rope import Rotation, rotate

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def attend_on_cpu(
    q_TNH: torch.Tensor,
    k_TKH: torch.Tensor,
    v_TKH: torch.Tensor,
    plan: AttentionPlan,
    scale: float | None,
    turn: Rotation | None,
) -> torch.Tensor:
    """See `attention.attention`; the row must have a real token."""
    return _Attention.apply(q_TNH, k_TKH, v_TKH, plan, scale, turn)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        plan: AttentionPlan,
        scale: float | None,
        turn: Rotation | None,
    ) -> torch.Tensor:
        if turn is not None:
            q, k = rotate(q, turn), rotate(k, turn)
        q, k, v = _to_slots(q, plan), _to_slots(k, plan), _to_slots(v, plan)
        results = []
        for bucket, *parts in zip(plan.buckets, *(_by_bucket(x, plan) for x in (q, k, v)), strict=True):
            results.append(_flash(*parts, 0.0, bucket.causal, attn_mask=_mask(bucket, q.dtype), scale=scale))
        out_SNH = _join([out for out, _ in results])
        ctx.save_for_backward(q, k, v, out_SNH, *(normaliser for _, normaliser in results))
        ctx.plan, ctx.scale, ctx.turn = plan, scale, turn
        return _to_row(out_SNH, plan)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        plan, turn = ctx.plan, ctx.turn
        q, k, v, out, *normalisers = ctx.saved_tensors
        grad = _to_slots(grads[0], plan)
        if plan.repeats is not None:
            grad = grad.index_fill_(0, plan.repeats, 0.0)
        results = []
        pieces = zip(*(_by_bucket(x, plan) for x in (grad, q, k, v, out)), strict=True)
        for bucket, normaliser, piece in zip(plan.buckets, normalisers, pieces, strict=True):
            mask = _mask(bucket, q.dtype)
            results.append(_flash_backward(*piece, normaliser, 0.0, bucket.causal, attn_mask=mask, scale=ctx.scale))
        q_grad, k_grad, v_grad = (_to_row(_join(list(parts)), plan) for parts in zip(*results, strict=True))
        if turn is not None:
            q_grad, k_grad = rotate(q_grad, turn, -1), rotate(k_grad, turn, -1)
        return q_grad, k_grad, v_grad, None, None, None


def _mask(bucket: Bucket, dtype: torch.dtype) -> torch.Tensor | None:
    return None if bucket.mask is None else bucket.mask.to(dtype)


def _to_slots(x: torch.Tensor, plan: AttentionPlan) -> torch.Tensor:
    """[T, heads, H] -> [S, heads, H]."""
    if plan.gather is not None:
        return x.index_select(0, plan.gather)
    return x if plan.real == plan.tokens else x[: plan.real]


def _to_row(x_SNH: torch.Tensor, plan: AttentionPlan) -> torch.Tensor:
    """[S, heads, H] -> [T, heads, H], 0 in the row's padding. The inverse of `_to_slots`, which is also its gradient:
    no real token sees a repeat, so a repeat's gradient is zero."""
    if plan.real == plan.tokens:
        return x_SNH if plan.scatter is None else x_SNH.index_select(0, plan.scatter)
    row = x_SNH.new_empty(plan.tokens, *x_SNH.shape[1:])
    row[plan.real :] = 0
    if plan.scatter is None:
        row[: plan.real] = x_SNH
    else:
        torch.index_select(x_SNH, 0, plan.scatter, out=row[: plan.real])
    return row


def _by_bucket(x_SNH: torch.Tensor, plan: AttentionPlan) -> list[torch.Tensor]:
    """[S, heads, H] -> a view [B, heads, L, H] for every bucket."""
    pieces = (x_SNH,) if len(plan.buckets) == 1 else x_SNH.split(plan.slots)
    return [
        piece.view(bucket.documents, bucket.length, *piece.shape[1:]).transpose(1, 2)
        for piece, bucket in zip(pieces, plan.buckets, strict=True)
    ]


def _join(pieces: list[torch.Tensor]) -> torch.Tensor:
    """[B, heads, L, H] of every bucket -> [S, heads, H]."""
    rows = [piece.transpose(1, 2).flatten(0, 1) for piece in pieces]
    return rows[0] if len(rows) == 1 else torch.cat(rows)
