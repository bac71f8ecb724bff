"""The calls of torch's CPU flash attention that make up a row's attention, on slots.

A causal run of queries that begins inside its document is two calls, a rectangle and a square, whose results are merged
by their log-sum-exp. Backward, each call takes the merged output and log-sum-exp and so gives its own part of the
gradient.

Shape suffixes: S slots (see `attention_slots`; queries and keys may have different ones), N query heads, K key/value
heads, H head width, B documents of a call.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch

from megatron_gemini.kernels.attention_documents import DocumentCalls
from megatron_gemini.kernels.attention_merge import merge_two

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


class Call(NamedTuple):
    """Documents whose queries are slots [query, query_end) and whose keys are [key, key_end).

    key_slots: of all calls together. every_query: the call has all slots of queries. again: the queries are those of
    the call before.
    """

    documents: int
    query: int
    query_end: int
    every_query: bool
    key: int
    key_end: int
    key_slots: int
    causal: bool
    mask: torch.Tensor | None
    again: bool

    def of_queries(self, x_S: torch.Tensor) -> torch.Tensor:
        """[S, N, ...] -> [B, N, queries, ...]."""
        x_S = x_S if self.every_query else x_S[self.query : self.query_end]
        return x_S.view(self.documents, -1, *x_S.shape[1:]).transpose(1, 2)

    @property
    def every_key(self) -> bool:
        return self.key_end - self.key == self.key_slots

    def of_keys(self, x_S: torch.Tensor) -> torch.Tensor:
        """[S, K, H] -> [B, K, keys, H]."""
        x_S = x_S if self.every_key else x_S[self.key : self.key_end]
        return x_S.view(self.documents, -1, *x_S.shape[1:]).transpose(1, 2)

    def biased(self, dtype: torch.dtype) -> torch.Tensor | None:
        return None if self.mask is None else self.mask.to(dtype)


def cpu_calls(documents: DocumentCalls) -> tuple[Call, ...]:
    """In the order of the queries' slots."""
    pieces: list[tuple] = []
    place = 0
    for bucket, slots in zip(documents.buckets, documents.bucket_slots, strict=True):
        end = place + slots
        pieces.append((bucket.documents, place, end, place, end, bucket.causal, bucket.mask, False))
        place = end
    for query, query_end, key, key_end, causal in documents.runs:
        before = key_end - (query_end - query)  # keys before a causal run's own are seen by all its queries
        if causal:
            pieces.append((1, query, query_end, before, key_end, True, None, False))
        if before > key or not causal:
            pieces.append((1, query, query_end, key, before if causal else key_end, False, None, causal))
    queries, keys = max(piece[2] for piece in pieces), documents.key_slots
    return tuple(
        Call(b, q, q_end, q_end - q == queries, k, k_end, keys, *how) for b, q, q_end, k, k_end, *how in pieces
    )


def attend_slots(
    q_SNH: torch.Tensor, k_SKH: torch.Tensor, v_SKH: torch.Tensor, calls: Sequence[Call], scale: float | None
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """(out_SNH, and for the backward of every call its queries, keys, values, output and log-sum-exp, [B, N, ...])."""
    inputs = [(call.of_queries(q_SNH), call.of_keys(k_SKH), call.of_keys(v_SKH)) for call in calls]
    parts = [
        _flash(*qkv, 0.0, call.causal, attn_mask=call.biased(q_SNH.dtype), scale=scale)
        for call, qkv in zip(calls, inputs, strict=True)
    ]
    if len(calls) == 1:
        return _to_slots(parts[0][0]), [*inputs[0], *parts[0]]
    outs: list[torch.Tensor] = []
    sums: list[torch.Tensor] = []
    for call, part in zip(calls, parts, strict=True):
        out, lse = map(_to_slots, part)
        if call.again:
            outs[-1], sums[-1] = merge_two(outs[-1], sums[-1], out, lse)
        else:
            outs.append(out)
            sums.append(lse)
    out_SNH, lse_SN = torch.cat(outs), torch.cat(sums)
    saved: list[torch.Tensor] = []
    for call, qkv in zip(calls, inputs, strict=True):
        saved += (*qkv, call.of_queries(out_SNH), call.of_queries(lse_SN))
    return out_SNH, saved


def attend_slots_backward(
    grad_SNH: torch.Tensor, saved: Sequence[torch.Tensor], calls: Sequence[Call], scale: float | None
) -> tuple[torch.Tensor, ...]:
    """Gradients of q_SNH, k_SKH and v_SKH."""
    grads = []
    for i, call in enumerate(calls):
        inputs = (call.of_queries(grad_SNH), *saved[5 * i : 5 * i + 5])
        mask = call.biased(grad_SNH.dtype)
        grads.append(_flash_backward(*inputs, 0.0, call.causal, attn_mask=mask, scale=scale))
    if len(calls) == 1 and calls[0].every_key:
        return tuple(map(_to_slots, grads[0]))
    q_grads, k_grads, v_grads = zip(*grads, strict=True)
    return _sum_of_queries(q_grads, calls), _sum_of_keys(k_grads, calls), _sum_of_keys(v_grads, calls)


def saved_lse(saved: Sequence[torch.Tensor], calls: Sequence[Call]) -> torch.Tensor:
    """Log-sum-exp of the scores, float32 [S, N], out of what `attend_slots` saves."""
    return _join([_to_slots(lse) for call, lse in zip(calls, saved[4::5], strict=True) if not call.again])


def lse_gradients(
    grad_SN: torch.Tensor, saved: Sequence[torch.Tensor], calls: Sequence[Call], scale: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of q_SNH and k_SKH, given the log-sum-exp's.

    d lse / d q is scale * (P k), which is attention with the keys as values; d lse / d k, weighted by the gradient g,
    is scale * P^T (g q), which is the values' gradient of attention whose output has the gradient g q.
    """
    q_grads, k_grads = [], []
    for i, call in enumerate(calls):
        q, k, _, _, lse = saved[5 * i : 5 * i + 5]
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        weight = scale * call.of_queries(grad_SN).unsqueeze(-1).to(q.dtype)
        mask = call.biased(q.dtype)
        mean, part = _flash(q, k, k, 0.0, call.causal, attn_mask=mask, scale=scale)
        mean = mean * (part - lse).exp().unsqueeze(-1).to(mean.dtype)  # a part of the keys has a part of the weight
        q_grads.append(weight * mean)
        inputs = (weight * q, q, k, k, mean, lse)
        k_grads.append(_flash_backward(*inputs, 0.0, call.causal, attn_mask=mask, scale=scale)[2])
    return _sum_of_queries(q_grads, calls), _sum_of_keys(k_grads, calls)


def _to_slots(x: torch.Tensor) -> torch.Tensor:
    """[B, N, queries, ...] -> [S, N, ...]."""
    return x.transpose(1, 2).flatten(0, 1)


def _sum_of_queries(grads: Sequence[torch.Tensor], calls: Sequence[Call]) -> torch.Tensor:
    pieces: list[torch.Tensor] = []
    for call, grad in zip(calls, grads, strict=True):
        if call.again:
            pieces[-1] = pieces[-1] + _to_slots(grad)
        else:
            pieces.append(_to_slots(grad))
    return _join(pieces)


def _sum_of_keys(grads: Sequence[torch.Tensor], calls: Sequence[Call]) -> torch.Tensor:
    """[S, K, H]; where several calls see a key, summed in float32 at least."""
    slots = calls[0].key_slots
    in_order = all(a.key_end == b.key for a, b in pairwise(calls))
    if in_order and calls[0].key == 0 and calls[-1].key_end == slots:
        return _join([_to_slots(grad) for grad in grads])
    first = _to_slots(grads[0])
    dtype = torch.promote_types(first.dtype, torch.float32)
    total = first.new_zeros(slots, *first.shape[1:], dtype=dtype)
    for call, grad in zip(calls, grads, strict=True):
        total[call.key : call.key_end] += _to_slots(grad)
    return total.to(first.dtype)


def _join(pieces: Sequence[torch.Tensor]) -> torch.Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(list(pieces))
