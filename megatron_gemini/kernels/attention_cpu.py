"""Attention on CPU: RoPE, buckets and torch's CPU flash attention as one autograd node.

Against `attention_sdpa` this saves two dozen autograd nodes a layer and the slow backward of every view and gather.

Shape suffixes: T packed tokens, S slots of all buckets, N query heads, K key/value heads, H head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from megatron_gemini.kernels.attention_plan import AttentionPlan
from megatron_gemini.kernels.rope import Rotation, rotate_both

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


def attend_and_project_on_cpu(
    q_TNH: torch.Tensor,
    k_TKH: torch.Tensor,
    v_TKH: torch.Tensor,
    plan: AttentionPlan,
    turn: Rotation,
    weight: torch.Tensor,
    residual_TD: torch.Tensor,
) -> torch.Tensor:
    """See `attention.attention_output`; the row must have a real token."""
    return _AttentionOutput.apply(q_TNH, k_TKH, v_TKH, weight, residual_TD, plan, turn)


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
        out_TNH, saved = _forward(q, k, v, plan, scale, turn)
        ctx.save_for_backward(*saved)
        ctx.plan, ctx.scale, ctx.turn = plan, scale, turn
        return out_TNH

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return *_backward(grads[0], ctx.saved_tensors, ctx.plan, ctx.scale, ctx.turn), None, None, None


class _AttentionOutput(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        weight: torch.Tensor,
        residual: torch.Tensor,
        plan: AttentionPlan,
        turn: Rotation,
    ) -> torch.Tensor:
        out_TNH, saved = _forward(q, k, v, plan, None, turn)
        out = out_TNH.flatten(1)
        ctx.save_for_backward(weight, out, *saved)
        ctx.plan, ctx.turn, ctx.shape = plan, turn, out_TNH.shape
        return torch.addmm(residual, out, weight.t())

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,) = grads
        weight, out, *saved = ctx.saved_tensors
        weight_grad = torch.mm(grad.t(), out) if ctx.needs_input_grad[3] else None
        out_grad = torch.mm(grad, weight).view(ctx.shape)
        return *_backward(out_grad, saved, ctx.plan, None, ctx.turn), weight_grad, grad, None, None


def _forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: AttentionPlan,
    scale: float | None,
    turn: Rotation | None,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """(out_TNH, and for the backward every bucket's q, k, v, out and normaliser)."""
    if turn is not None:
        q, k = rotate_both(q, k, turn)
    parts = zip(*(_by_bucket(_to_slots(x, plan), plan) for x in (q, k, v)), strict=True)
    outs: list[torch.Tensor] = []
    saved: list[torch.Tensor] = []
    for bucket, part in zip(plan.buckets, parts, strict=True):
        mask = None if bucket.mask is None else bucket.mask.to(q.dtype)
        out, normaliser = _flash(*part, 0.0, bucket.causal, attn_mask=mask, scale=scale)
        outs.append(out)
        saved.extend((*part, out, normaliser))
    return _to_row(_join(outs), plan), saved


def _backward(
    grad: torch.Tensor,
    saved: Sequence[torch.Tensor],
    plan: AttentionPlan,
    scale: float | None,
    turn: Rotation | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of q, k and v, given out_TNH's."""
    grad = _to_slots(grad, plan)
    if plan.repeats is not None:
        grad = grad.index_fill_(0, plan.repeats, 0.0)
    results = []
    for i, (bucket, part) in enumerate(zip(plan.buckets, _by_bucket(grad, plan), strict=True)):
        mask = None if bucket.mask is None else bucket.mask.to(grad.dtype)
        inputs = (part, *saved[5 * i : 5 * i + 5])
        results.append(_flash_backward(*inputs, 0.0, bucket.causal, attn_mask=mask, scale=scale))
    q_grad, k_grad, v_grad = (_to_row(_join(parts), plan) for parts in zip(*results, strict=True))
    if turn is not None:
        q_grad, k_grad = rotate_both(q_grad, k_grad, turn, -1)
    return q_grad, k_grad, v_grad


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
        x.view(b.documents, b.length, *x.shape[1:]).transpose(1, 2) for x, b in zip(pieces, plan.buckets, strict=True)
    ]


def _join(pieces: Sequence[torch.Tensor]) -> torch.Tensor:
    """[B, heads, L, H] of every bucket -> [S, heads, H]."""
    if len(pieces) == 1:
        return pieces[0].transpose(1, 2).flatten(0, 1)
    return torch.cat([piece.transpose(1, 2).flatten(0, 1) for piece in pieces])
