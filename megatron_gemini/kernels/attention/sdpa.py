"""Attention by torch's public scaled_dot_product_attention, on any device.

Shape suffixes: T packed tokens, or in the cross form M memory embeddings; Q queries (T, or this rank's), S slots (see
`slot_mapping`), N query heads, K key/value heads, H head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import CausalBias, causal_lower_right

from megatron_gemini.kernels.attention.plan import AttentionPlan
from megatron_gemini.kernels.attention.slot_mapping import SlotMapping, to_rows, to_slots, without_repeats
from megatron_gemini.kernels.autograd import Gradients, NodeContext
from megatron_gemini.kernels.rope import CosSin


def attend_by_sdpa(
    q_QNH: torch.Tensor,
    k_TKH: torch.Tensor,
    v_TKH: torch.Tensor,
    plan: AttentionPlan,
    scale: float | None,
    cos_sin: CosSin | None,
    *,
    with_lse: bool = False,
) -> tuple[torch.Tensor, None]:
    """See `api.attention`; some query must see a key."""
    assert not with_lse, "the dispatch point asks first"
    if cos_sin is not None:
        q_QNH, k_TKH = plan.apply_rope(q_QNH, k_TKH, cos_sin)
    calls = plan.documents
    q_SNH = _ToSlots.apply(q_QNH, calls.queries)
    k_SKH, v_SKH = (_ToSlots.apply(x, calls.keys) for x in (k_TKH, v_TKH))
    outs, place = [], 0
    for bucket, slots in zip(calls.buckets, calls.bucket_slots, strict=True):
        size, end = (bucket.documents, bucket.length), place + slots
        q, k, v = (x[place:end].unflatten(0, size) for x in (q_SNH, k_SKH, v_SKH))
        mask = None if bucket.mask is None else bucket.mask.to(q.dtype)
        outs.append(_attend(q, k, v, mask, bucket.causal, scale))
        place = end
    for run in calls.runs:
        q, k, v = q_SNH[run.query : run.query_end], k_SKH[run.key : run.key_end], v_SKH[run.key : run.key_end]
        bias = causal_lower_right(len(q), len(k)) if run.causal else None  # on CUDA no mask is made of it
        outs.append(_attend(q[None], k[None], v[None], bias, False, scale))
    return _ToRows.apply(outs[0] if len(outs) == 1 else torch.cat(outs), calls.queries), None


def _attend(
    q_BLNH: torch.Tensor,
    k_BLKH: torch.Tensor,
    v_BLKH: torch.Tensor,
    mask: torch.Tensor | CausalBias | None,
    causal: bool,
    scale: float | None,
) -> torch.Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q_BLNH, k_BLKH, v_BLKH))
    grouped = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped)
    return out.transpose(1, 2).flatten(0, 1)


class _SlotContext(NodeContext):
    slots: SlotMapping


class _ToSlots(torch.autograd.Function):
    """`to_slots`, whose backward is a gather too; index_select's own adds row by row, several times slower on CPU."""

    @staticmethod
    def forward(ctx: _SlotContext, x_T: torch.Tensor, slots: SlotMapping) -> torch.Tensor:
        ctx.slots = slots
        return to_slots(x_T, slots)

    @staticmethod
    def backward(ctx: _SlotContext, *grads: torch.Tensor) -> Gradients:
        return to_rows(grads[0], ctx.slots), None


class _ToRows(torch.autograd.Function):
    """`to_rows`, the inverse, with a gather as its backward for the same reason."""

    @staticmethod
    def forward(ctx: _SlotContext, x_S: torch.Tensor, slots: SlotMapping) -> torch.Tensor:
        ctx.slots = slots
        return to_rows(x_S, slots)

    @staticmethod
    def backward(ctx: _SlotContext, *grads: torch.Tensor) -> Gradients:
        return without_repeats(to_slots(grads[0], ctx.slots), ctx.slots), None
