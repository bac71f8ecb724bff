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

    every_query, every_key: these are all slots. again: the queries are those of the call before.
    """

    documents: int
    query: int
    query_end: int
    every_query: bool
    key: int
    key_end: int
    every_key: bool
    causal: bool
    mask: torch.Tensor | None
    again: bool

    def of_queries(self, x_S: torch.Tensor) -> torch.Tensor:
        """[S, N, ...] -> [B, N, queries, ...]."""
        x_S = x_S if self.every_query else x_S[self.query : self.query_end]
        return x_S.view(self.documents, -1, *x_S.shape[1:]).transpose(1, 2)

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
        Call(b, q, q_end, q_end - q == queries, k, k_end, k_end - k == keys, *how)
        for b, q, q_end, k, k_end, *how in pieces
    )


def attend_slots(
    q_SNH: torch.Tensor, k_SKH: torch.Tensor, v_SKH: torch.Tensor, calls: Sequence[Call], scale: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out_SNH, float32 log-sum-exp of the scores, [S, N])."""
    outs: list[torch.Tensor] = []
    sums: list[torch.Tensor] = []
    for call in calls:
        queries, keys, values = call.of_queries(q_SNH), call.of_keys(k_SKH), call.of_keys(v_SKH)
        mask = call.biased(q_SNH.dtype)
        pair = _flash(queries, keys, values, 0.0, call.causal, attn_mask=mask, scale=scale)
        out, lse = (x.transpose(1, 2).flatten(0, 1) for x in pair)
        if call.again:
            outs[-1], sums[-1] = merge_two(outs[-1], sums[-1], out, lse)
        else:
            outs.append(out)
            sums.append(lse)
    return _join(outs), _join(sums)


def attend_slots_backward(
    grad_SNH: torch.Tensor, saved: Sequence[torch.Tensor], calls: Sequence[Call], scale: float | None
) -> tuple[torch.Tensor, ...]:
    """Gradients of q_SNH, k_SKH and v_SKH. saved: these three, out_SNH and its log-sum-exp."""
    q, k, v, out, lse = saved
    q_grads: list[torch.Tensor] = []
    key_grads = _KeyGradients(k, calls)
    for call in calls:
        q_grad, *parts = _flash_backward(
            call.of_queries(grad_SNH),
            call.of_queries(q),
            call.of_keys(k),
            call.of_keys(v),
            call.of_queries(out),
            call.of_queries(lse),
            0.0,
            call.causal,
            attn_mask=call.biased(q.dtype),
            scale=scale,
        )
        _append(q_grads, q_grad.transpose(1, 2).flatten(0, 1), call.again)
        key_grads.add(call, parts)
    return _join(q_grads), *key_grads.result()


def lse_gradients(
    grad_SN: torch.Tensor, saved: Sequence[torch.Tensor], calls: Sequence[Call], scale: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of q_SNH and k_SKH, given the log-sum-exp's.

    d lse / d q is scale * (P k), which is attention with the keys as values; d lse / d k, weighted by the gradient g,
    is scale * P^T (g q), which is the values' gradient of attention whose output has the gradient g q.
    """
    q, k, _, _, lse = saved
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    weighted = grad_SN.unsqueeze(-1).to(q.dtype) * q
    q_grads: list[torch.Tensor] = []
    key_grads = _KeyGradients(k, calls)
    for call in calls:
        queries, keys = call.of_queries(q), call.of_keys(k)
        mean, part = _flash(queries, keys, keys, 0.0, call.causal, attn_mask=call.biased(q.dtype), scale=scale)
        mean = mean * (part - call.of_queries(lse)).exp().unsqueeze(-1).to(mean.dtype)
        _append(q_grads, mean.transpose(1, 2).flatten(0, 1), call.again)
        k_grad = _flash_backward(
            call.of_queries(weighted),
            queries,
            keys,
            keys,
            mean,
            call.of_queries(lse),
            0.0,
            call.causal,
            attn_mask=call.biased(q.dtype),
            scale=scale,
        )[2]
        key_grads.add(call, (k_grad,))
    q_grad = _join(q_grads) * grad_SN.unsqueeze(-1).to(q.dtype)
    return q_grad.mul_(scale), key_grads.result()[0].mul_(scale)


class _KeyGradients:
    """Gradients of keys and values of all calls; where several runs see a key, summed in float32."""

    def __init__(self, like: torch.Tensor, calls: Sequence[Call]) -> None:
        self.like = like
        covered = sum(call.key_end - call.key for call in calls)
        self.shared = covered != len(like) or any(a.key_end > b.key for a, b in pairwise(calls))
        self.parts: list[list[torch.Tensor]] = []  # of each of the two: every call's, or the one sum

    def add(self, call: Call, grads: Sequence[torch.Tensor]) -> None:
        if not self.parts:
            self.parts = [[self._zeros()] if self.shared else [] for _ in grads]
        for parts, grad in zip(self.parts, grads, strict=True):
            rows = grad.transpose(1, 2).flatten(0, 1)
            if self.shared:
                parts[0][call.key : call.key_end] += rows
            else:
                parts.append(rows)

    def _zeros(self) -> torch.Tensor:
        return torch.zeros_like(self.like, dtype=torch.promote_types(self.like.dtype, torch.float32))

    def result(self) -> tuple[torch.Tensor, ...]:
        return tuple(_join(parts).to(self.like.dtype) for parts in self.parts)


def _append(pieces: list[torch.Tensor], piece: torch.Tensor, again: bool) -> None:
    if again:
        pieces[-1] = pieces[-1] + piece
    else:
        pieces.append(piece)


def _join(pieces: Sequence[torch.Tensor]) -> torch.Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(list(pieces))
