"""A row's attention as few dense calls: documents of similar length together, long mixed ones run by run.

Shape suffixes: B documents of a bucket, L tokens of its longest document, S slots (see `slot_mapping`).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch

from megatron_gemini.kernels.attention.row import RowLayout
from megatron_gemini.kernels.attention.slot_mapping import SlotMapping, slots_of

# Of a bucket's slots this share may be padding: more costs arithmetic, less costs more and smaller calls. 64 documents
# of 32 tokens take 1.02 times as long as the same in a batch (docs/performance.md, "Attention on CPU").
MAX_WASTE = 0.15
# Pairs of a query and a key that take about as long as one more call. A document below it is cheaper with a mask. Cut
# into runs, documents with images take 0.23 of the time of one mask over the row (the same place).
CALL_PAIRS = 2048

CAUSAL, FULL, MIXED = range(3)  # no span; one span that is the whole document; anything else


@dataclass(frozen=True)
class Bucket:
    """Documents of similar length as [B, L]; the slots after a document's end repeat its last token.

    causal: a token sees those before it and itself. As repeats come last, no real token sees one.
    mask: float32 [B, 1, L or 1, L], 0 where a query sees a key and -inf elsewhere, where `causal` cannot say it; None
        if all is seen.
    """

    documents: int
    length: int
    causal: bool
    mask: torch.Tensor | None


class Run(NamedTuple):
    """Consecutive queries that see the same keys, or each one more than the one before it: slots, end exclusive.

    causal: the last query sees the last key and each query before it one less.
    """

    query: int
    query_end: int
    key: int
    key_end: int
    causal: bool


@dataclass(frozen=True)
class DocumentCalls:
    """Whole documents in buckets, then runs of queries of those that are cut.

    Documents are cut where this rank has only some of their queries, where a mask over the whole document would cost
    more, and where they see memory in place of themselves.
    queries, keys: where the calls' slots are in q's and in k's and v's rows; one object if they are the same.
    """

    queries: SlotMapping
    keys: SlotMapping
    buckets: tuple[Bucket, ...]
    runs: tuple[Run, ...]
    query_slots: int
    key_slots: int

    @property
    def bucket_slots(self) -> list[int]:
        return [bucket.documents * bucket.length for bucket in self.buckets]


class _Document(NamedTuple):
    kind: int
    length: int
    start: int
    query: int  # the row of q of its first query
    query_end: int

    @property
    def whole(self) -> bool:
        return self.query_end - self.query == self.length


def group_documents(row: RowLayout, device: torch.device) -> DocumentCalls:
    span, query = row.span, row.query
    documents = _documents(row)
    long = {d for d in documents if d.kind == MIXED and d.length**2 > 2 * CALL_PAIRS}
    runs = {d: _runs(d, span, query) for d in documents if d in long or not d.whole}
    cut = [d for d, of_document in runs.items() if not d.whole or _cheaper_cut(d, of_document)]
    chosen = set(cut)
    groups = _group([d for d in documents if d not in chosen])
    nothing = np.empty(0, np.int64)
    together = np.concatenate([nothing, *map(_slot_positions, groups)])
    key_S = np.concatenate([together, *(np.arange(d.start, d.start + d.length) for d in cut)])
    queries = keys = slots_of(key_S, len(row.segment), device)
    if query is not None:
        query_S = [np.searchsorted(query, together), *(np.arange(d.query, d.query_end) for d in cut)]
        queries = slots_of(np.concatenate(query_S), len(query), device)
    placed, query_end, key_end = [], len(together), len(together)  # the runs, in slots behind the buckets'
    for document in cut:
        for run in runs[document]:
            q, k = query_end, key_end
            placed.append(Run(q + run.query, q + run.query_end, k, k + run.key_end, run.causal))
        query_end += document.query_end - document.query
        key_end += document.length
    buckets = tuple(_bucket(group, span, device) for group in groups)
    return DocumentCalls(queries, keys, buckets, tuple(placed), query_end, key_end)


def _documents(row: RowLayout) -> list[_Document]:
    """Those that have a query."""
    edges = row.documents.tolist()
    places = edges if row.query is None else np.searchsorted(row.query, edges).tolist()
    documents = []
    for (start, end), (first, last) in zip(pairwise(edges), pairwise(places), strict=True):
        if first == last or start >= row.real:
            continue
        inside = row.span[start:end]
        kind = CAUSAL if not inside.any() else FULL if (inside == inside[0]).all() else MIXED
        documents.append(_Document(kind, end - start, start, first, last))
    return documents


def _runs(document: _Document, span: np.ndarray, query: np.ndarray | None) -> list[Run]:
    """The document's runs, with queries counted from its first query of this rank and keys from its start."""
    start, length = document.start, document.length
    inside = span[start : start + length]
    edges = np.flatnonzero(inside[1:] != inside[:-1]) + 1
    position = np.arange(length) if query is None else query[document.query : document.query_end] - start
    ends = np.append(edges, length)[np.searchsorted(edges, position, side="right")]  # of every query's span or gap
    breaks = np.flatnonzero((ends[1:] != ends[:-1]) | (np.diff(position) != 1)) + 1
    runs = []
    for first, last in pairwise([0, *breaks.tolist(), len(position)]):
        causal = inside[position[first]] == 0
        end = position[last - 1] + 1 if causal else ends[first]
        runs.append(Run(first, last, 0, int(end), bool(causal and last - first > 1)))
    return runs


def _cheaper_cut(document: _Document, runs: list[Run]) -> bool:
    """Whether its runs take less time than one call with a mask over the whole document."""
    pairs = 0
    for run in runs:
        queries = run.query_end - run.query
        pairs += CALL_PAIRS * (1 + run.causal) + queries * run.key_end - run.causal * queries * queries // 2
    return pairs < document.length**2 + CALL_PAIRS


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
    if kind == FULL and real.all():
        return Bucket(len(group), length, False, None)
    if kind == FULL:
        seen = real[:, None, None, :]
    else:
        span_BL = np.where(real, span[_slot_positions(group)].reshape(real.shape), 0)
        same = (span_BL[:, :, None] == span_BL[:, None, :]) & (span_BL[:, :, None] != 0)
        seen = (same | (slot <= slot[:, None]))[:, None]
    mask = torch.from_numpy(np.where(seen, np.float32(0), np.float32(-np.inf)))  # torch's CPU kernel adds it
    return Bucket(len(group), length, False, mask.to(device))
