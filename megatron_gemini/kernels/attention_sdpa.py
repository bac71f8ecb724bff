"""Attention by torch's public scaled_dot_product_attention, on any device.

Shape suffixes: T packed tokens, N query heads, K key/value heads, H head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from megatron_gemini.kernels.attention_plan import AttentionPlan, Bucket
from megatron_gemini.kernels.rope import Rotation, rotate


def attend_by_sdpa(
    q_TNH: torch.Tensor,
    k_TKH: torch.Tensor,
    v_TKH: torch.Tensor,
    plan: AttentionPlan,
    scale: float | None,
    turn: Rotation | None,
) -> torch.Tensor:
    """See `attention.attention`; the row must have a real token."""
    if turn is not None:
        q_TNH, k_TKH = rotate(q_TNH, turn), rotate(k_TKH, turn)
    parts: list[torch.Tensor] = [q_TNH, k_TKH, v_TKH]
    if plan.gather is not None:
        parts = [_Gather.apply(x, plan) for x in parts]
    elif plan.real < plan.tokens:
        parts = [x[: plan.real] for x in parts]
    if len(plan.buckets) == 1:
        out = _attend(parts, plan.buckets[0], scale)
    else:
        pieces = zip(*(x.split(plan.slots) for x in parts), strict=True)
        out = torch.cat([_attend(piece, bucket, scale) for piece, bucket in zip(pieces, plan.buckets, strict=True)])
    if plan.scatter is not None:
        out = _Scatter.apply(out, plan)
    return out if plan.real == plan.tokens else F.pad(out, (0, 0, 0, 0, 0, plan.tokens - plan.real))


def _attend(parts: Sequence[torch.Tensor], bucket: Bucket, scale: float | None) -> torch.Tensor:
    size = (bucket.documents, bucket.length)
    q, k, v = (x.unflatten(0, size).transpose(1, 2) for x in parts)
    grouped = q.shape[1] != k.shape[1]
    mask = None if bucket.mask is None else bucket.mask.to(q.dtype)
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=bucket.causal, scale=scale, enable_gqa=grouped
    )
    return out.transpose(1, 2).flatten(0, 1)


class _Gather(torch.autograd.Function):
    """Row -> slots. A repeat's gradient is zero (no real query sees it), so the backward is a gather too.

    index_select's own backward adds row by row, which is several times slower on CPU.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, plan: Any) -> torch.Tensor:
        ctx.plan = plan
        return x.index_select(0, plan.gather)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        plan = ctx.plan
        if plan.real == plan.tokens:
            return grads[0].index_select(0, plan.scatter), None
        x_grad = grads[0].new_zeros(plan.tokens, *grads[0].shape[1:])
        torch.index_select(grads[0], 0, plan.scatter, out=x_grad[: plan.real])
        return x_grad, None


class _Scatter(torch.autograd.Function):
    """Slots -> real tokens; the gradient of a repeat is zero."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, plan: Any) -> torch.Tensor:
        ctx.plan = plan
        return x.index_select(0, plan.scatter)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        slots_grad = grads[0].index_select(0, ctx.plan.gather)
        if ctx.plan.repeats is not None:
            slots_grad.index_fill_(0, ctx.plan.repeats, 0.0)
        return slots_grad, None
