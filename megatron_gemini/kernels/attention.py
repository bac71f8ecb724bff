"""Attention over one packed row, document by document: nothing is computed across documents.

Shape suffixes: T packed tokens, N query heads, K key/value heads, H head width, B documents of a bucket, L tokens of
its longest document. A slot is one of a bucket's B x L places.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

MAX_WASTE = 0.15  # of a bucket's slots may be padding: more costs arithmetic, less costs more and smaller calls


@dataclass(frozen=True)
class Bucket:
    """Documents of similar length as [B, L]; the slots after a document's end repeat its last token.

    causal: a token sees those before it and itself. The repeats come last, so no real token sees one.
    mask: bool [B, 1, L or 1, L], True where a query sees a key, where `causal` cannot say it; None if all is seen.
    """

    documents: int
    length: int
    causal: bool
    mask: torch.Tensor | None


@dataclass(frozen=True)
class AttentionPlan:
    """What the attention of every layer needs to know of a row's documents. Made by `plan_attention`; opaque.

    gather: position in the row of every slot, bucket after bucket; None where the real tokens already lie as the one
        bucket wants them (a single document, or frames of one size), which then costs nothing.
    scatter: slot of every real token, the inverse of `gather`.
    repeats: the slots after the documents' ends; None if there is none.
    """

    tokens: int
    real: int
    buckets: tuple[Bucket, ...]
    gather: torch.Tensor | None
    scatter: torch.Tensor | None
    repeats: torch.Tensor | None


def plan_attention(segment_T: torch.Tensor, span_T: torch.Tensor) -> AttentionPlan:
    """Group a row's documents by kind and length, once a microbatch.

    segment_T: integer document ids, each one contiguous run; 0 is padding, at the end of the row only.
    span_T: integer, 0 for a causal token, otherwise the id of a bidirectional span (see `contracts.Batch`).
    Raises ValueError if padding comes before a document.
    """
    segment, span = segment_T.cpu().numpy(), span_T.cpu().numpy()
    documents = _documents(segment, span)
    real = sum(document.length for document in documents)
    if not (segment[:real] != 0).all():
        raise ValueError("segment_T has padding (0) before a document; padding belongs at the end of the row")
    device = segment_T.device
    buckets, starts = [], []
    for group in _group(documents):
        buckets.append(_bucket(group, span, device))
        starts.append(_slot_positions(group))
    gather = np.concatenate(starts) if starts else np.arange(0)
    if len(gather) == real and (gather == np.arange(real)).all() and len(buckets) <= 1:
        return AttentionPlan(len(segment), real, tuple(buckets), None, None, None)
    first = np.ones(len(gather), bool)  # a slot that shows the same token as the slot before it is a repeat
    first[1:] = gather[1:] != gather[:-1]
    scatter = np.empty(real, np.int64)
    scatter[gather[first]] = np.flatnonzero(first)
    repeats = None if first.all() else torch.from_numpy(np.flatnonzero(~first)).to(device)
    return AttentionPlan(
        len(segment),
        real,
        tuple(buckets),
        torch.from_numpy(gather).to(device),
        torch.from_numpy(scatter).to(device),
        repeats,
    )


def attention(
    q_TNH: torch.Tensor,
    k_TKH: torch.Tensor,
    v_TKH: torch.Tensor,
    plan: AttentionPlan,
    scale: float | None = None,
) -> torch.Tensor:
    """softmax(q k^T * scale) v within documents, by the mask rule of `contracts.Batch`; [T, N, H], padding rows are 0.

    scale: 1/sqrt(H) if None. K divides N: query head n reads key/value head n // (N // K).
    """
    if plan.real == 0:  # the graph stays whole, with gradients of zero
        return torch.zeros_like(q_TNH) + 0 * (q_TNH.sum() + k_TKH.sum() + v_TKH.sum())
    parts: list[torch.Tensor] = [q_TNH, k_TKH, v_TKH]
    if plan.gather is not None:
        parts = [_Gather.apply(x, plan) for x in parts]
    elif plan.real < plan.tokens:
        parts = [x[: plan.real] for x in parts]
    out = _attend_buckets(parts, plan.buckets, scale)
    if plan.scatter is not None:
        out = _Scatter.apply(out, plan)
    return out if plan.real == plan.tokens else F.pad(out, (0, 0, 0, 0, 0, plan.tokens - plan.real))


def attention_backend(device: torch.device) -> tuple[str, str]:
    """The implementation that `attention` takes on `device`, and why, for the run's first log lines."""
    return "torch SDPA", f"the only one for {device.type}; documents of similar length share a call"


def _attend_buckets(parts: list[torch.Tensor], buckets: tuple[Bucket, ...], scale: float | None) -> torch.Tensor:
    """q, k, v [slots, heads, H] -> [slots, N, H]."""
    if len(buckets) == 1:
        return _attend(parts, buckets[0], scale)
    slots = [bucket.documents * bucket.length for bucket in buckets]
    pieces = zip(*(x.split(slots) for x in parts), strict=True)
    return torch.cat([_attend(piece, bucket, scale) for piece, bucket in zip(pieces, buckets, strict=True)])


def _attend(parts: Sequence[torch.Tensor], bucket: Bucket, scale: float | None) -> torch.Tensor:
    size = (bucket.documents, bucket.length)
    q, k, v = (x.unflatten(0, size).transpose(1, 2) for x in parts)
    grouped = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=bucket.mask, is_causal=bucket.causal, scale=scale, enable_gqa=grouped
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


CAUSAL, FULL, MIXED = range(3)  # no span; one span that is the whole document; anything else


class _Document(NamedTuple):
    kind: int
    length: int
    start: int


def _documents(segment: np.ndarray, span: np.ndarray) -> list[_Document]:
    edges = np.flatnonzero(np.diff(segment, prepend=0, append=0) != 0) if len(segment) else np.arange(0)
    documents = []
    for start, end in pairwise([*edges.tolist(), len(segment)]):
        if start == end or segment[start] == 0:
            continue
        inside = span[start:end]
        kind = CAUSAL if not inside.any() else FULL if (inside == inside[0]).all() else MIXED
        documents.append(_Document(kind, end - start, start))
    return documents


def _group(documents: list[_Document]) -> list[list[_Document]]:
    """Documents of one kind that share a bucket, with at most MAX_WASTE of its slots repeats."""
    groups: list[list[_Document]] = []
    used = 0
    for document in sorted(documents, key=lambda d: (d.kind, -d.length, d.start)):
        if groups and groups[-1][0].kind == document.kind:
            slots = groups[-1][0].length * (len(groups[-1]) + 1)
            if slots - used - document.length <= MAX_WASTE * slots:
                groups[-1].append(document)
                used += document.length
                continue
        groups.append([document])
        used = document.length
    return groups


def _slot_positions(group: list[_Document]) -> np.ndarray:
    start = np.array([[document.start] for document in group])
    last = np.array([[document.length - 1] for document in group])
    return (start + np.minimum(np.arange(group[0].length), last)).reshape(-1)


def _bucket(group: list[_Document], span: np.ndarray, device: torch.device) -> Bucket:
    kind, length = group[0].kind, group[0].length
    slot = np.arange(length)
    real = slot < np.array([[document.length] for document in group])
    mask = None
    if kind == FULL and not real.all():
        mask = real[:, None, None, :]
    elif kind == MIXED:
        span_BL = np.where(real, span[_slot_positions(group)].reshape(real.shape), 0)
        same = (span_BL[:, :, None] == span_BL[:, None, :]) & (span_BL[:, :, None] != 0)
        mask = (same | (slot <= slot[:, None]))[:, None]
    return Bucket(len(group), length, kind == CAUSAL, None if mask is None else torch.from_numpy(mask).to(device))
