"""Which documents of a packed row are attended to in one call: metadata made once a microbatch, used by all layers.

Shape suffixes: T packed tokens, B documents of a bucket, L tokens of its longest document. A slot is one of a bucket's
B x L places.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch

MAX_WASTE = 0.15  # of a bucket's slots may be padding: more costs arithmetic, less costs more and smaller calls


@dataclass(frozen=True)
class Bucket:
    """Documents of similar length as [B, L]; the slots after a document's end repeat its last token.

    causal: a token sees those before it and itself. The repeats come last, so no real token sees one.
    mask: float32 [B, 1, L or 1, L], 0 where a query sees a key and -inf elsewhere, where `causal` cannot say it; None
        if all is seen.
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
    slots: B x L of every bucket.
    """

    tokens: int
    real: int
    buckets: tuple[Bucket, ...]
    gather: torch.Tensor | None
    scatter: torch.Tensor | None
    repeats: torch.Tensor | None

    @property
    def slots(self) -> list[int]:
        return [bucket.documents * bucket.length for bucket in self.buckets]


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
    groups = _group(documents)
    buckets = tuple(_bucket(group, span, device) for group in groups)
    if len(groups) <= 1 and all(document.length == documents[0].length for document in documents):
        return AttentionPlan(len(segment), real, buckets, None, None, None)
    gather = np.concatenate([_slot_positions(group) for group in groups])
    first = np.ones(len(gather), bool)  # a slot that shows the same token as the slot before it is a repeat
    first[1:] = gather[1:] != gather[:-1]
    scatter = np.empty(real, np.int64)
    scatter[gather[first]] = np.flatnonzero(first)
    repeats = None if first.all() else torch.from_numpy(np.flatnonzero(~first)).to(device)
    return AttentionPlan(
        len(segment),
        real,
        buckets,
        torch.from_numpy(gather).to(device),
        torch.from_numpy(scatter).to(device),
        repeats,
    )


CAUSAL, FULL, MIXED = range(3)  # no span; one span that is the whole document; anything else


class _Document(NamedTuple):
    kind: int
    length: int
    start: int


def _documents(segment: np.ndarray, span: np.ndarray) -> list[_Document]:
    edges = np.flatnonzero(segment[1:] != segment[:-1]) + 1
    documents = []
    for start, end in pairwise([0, *edges.tolist(), len(segment)]):
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
    if kind == CAUSAL:
        return Bucket(len(group), length, True, None)
    slot = np.arange(length)
    real = slot < np.array([[document.length] for document in group])
    mask = None
    if kind == FULL and not real.all():
        mask = real[:, None, None, :]
    elif kind == MIXED:
        span_BL = np.where(real, span[_slot_positions(group)].reshape(real.shape), 0)
        same = (span_BL[:, :, None] == span_BL[:, None, :]) & (span_BL[:, :, None] != 0)
        mask = (same | (slot <= slot[:, None]))[:, None]
    return Bucket(len(group), length, False, None if mask is None else _additive(mask).to(device))


def _additive(mask: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.where(mask, np.float32(0), np.float32(-np.inf)))
