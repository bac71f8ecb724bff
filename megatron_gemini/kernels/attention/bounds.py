"""Which keys each query sees and which queries see each key, two numbers a token: all that tiled kernels need of a row.

The keys that a query sees are one interval, from its document's start to itself or its span's end. The queries that see
a key are one as well, from the key or its span's start to its document's end. Of memory (`memory.py`) both hold too.

Shape suffixes: T packed tokens, which are the keys, or M memory embeddings in their place; Q queries.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch

from megatron_gemini.kernels.attention.row import RowLayout

# Tiles are put in order by blocks of so many tokens, sorted once for the tile sizes of all kernels: for 65,536 tokens
# the three orders take 0.05 ms and the bounds 0.10 ms, on the CPU once a microbatch (docs/performance.md).
ORDER_TOKENS = 128


class Intervals(NamedTuple):
    """`Bounds` in host memory, int32.

    query_2Q: query i sees the keys [query_2Q[0, i], query_2Q[1, i]). A query that sees none has (keys, 0).
    key_2T: key t is seen by the queries [key_2T[0, t], key_2T[1, t]), numbered as rows of q.
    """

    query_2Q: np.ndarray
    key_2T: np.ndarray


@dataclass(frozen=True)
class Bounds:
    """`Intervals` on the plan's device, and the order in which kernels take their tiles."""

    query_2Q: torch.Tensor
    key_2T: torch.Tensor
    _blocks: dict[str, np.ndarray]  # "query", "key": blocks of ORDER_TOKENS, those with the longest interval first
    _orders: dict[tuple[str, int, int], torch.Tensor] = field(default_factory=dict)

    def order(self, kind: str, group: int, block: int) -> torch.Tensor:
        """int32[tiles]: tiles of `block` rows, `group` rows a token, of "query" or "key" tokens, the longest first.

        Programs that begin with the long ones end at about the same time.
        """
        if (kind, group, block) not in self._orders:
            bounds, blocks = self.query_2Q if kind == "query" else self.key_2T, self._blocks[kind]
            tiles = -(-bounds.shape[1] * group // block)
            # A tile belongs to the block of tokens that it begins in: block b has the tiles [first[b], first[b + 1]).
            first = -(-np.arange(len(blocks) + 1) * (ORDER_TOKENS * group) // block)
            first = np.minimum(first, tiles).astype(np.int32)
            count = np.diff(first)[blocks]
            order = np.repeat(first[blocks] - (np.cumsum(count, dtype=np.int32) - count), count)
            np.add(order, np.arange(tiles, dtype=np.int32), out=order)
            self._orders[kind, group, block] = _to_device(order, bounds.device)
        return self._orders[kind, group, block]


class PackedSequences(NamedTuple):
    """Documents back to back that are all causal, or all seen whole.

    edges: int32[documents + 1], where each begins, and the end. real: tokens that are no padding.
    """

    edges: torch.Tensor
    longest: int
    causal: bool
    real: int


def read_sequences(row: RowLayout, device: torch.device) -> PackedSequences | None:
    """None if the row's documents are not alike, or there is none."""
    edges = row.documents[row.documents <= row.real]
    causal = not row.span[: row.real].any()
    # A span lies within a document, so documents are seen whole if spans have the same edges and none is a gap.
    spans = row.spans[row.spans <= row.real]
    if not row.real or not (causal or (np.array_equal(spans, edges) and row.span[edges[:-1]].all())):
        return None
    return PackedSequences(_to_device(edges, device), int(np.diff(edges).max()), causal, row.real)


def make_bounds(intervals: Intervals, device: torch.device) -> Bounds:
    query_2Q, key_2T = intervals
    blocks = {"query": _longest_first(query_2Q), "key": _longest_first(key_2T)}
    return Bounds(_to_device(query_2Q, device), _to_device(key_2T, device), blocks)


def read_intervals(row: RowLayout) -> Intervals:
    """Which of the row's tokens its queries see."""
    tokens, real = len(row.segment), row.real
    query, key = np.empty((2, tokens), np.int32), np.empty((2, tokens), np.int32)
    lengths = np.diff(row.documents)
    query[0], key[1] = np.repeat(row.documents[:-1], lengths), np.repeat(row.documents[1:], lengths)
    key[0] = _positions(tokens + 1)[:-1]
    query[1] = _positions(tokens + 1)[1:]
    reach, first = query[1], key[0]
    wide = np.flatnonzero(row.span[row.spans[:-1]]) if tokens else np.empty(0, np.int64)
    for start, end in zip(row.spans[wide].tolist(), row.spans[1:][wide].tolist(), strict=True):
        reach[start:end], first[start:end] = end, start
    if real < tokens:
        query[:, real:], key[:, real:] = [[tokens], [0]], [[tokens], [0]]
    return select_queries(Intervals(query, key), row.query)


def select_queries(intervals: Intervals, query: np.ndarray | None) -> Intervals:
    """Those of the queries at positions `query`, given those of all the row's tokens; None: all."""
    if query is None:
        return intervals
    # Positions become rows of q. Where a key's interval has none of them, both ends become the same row: empty.
    return Intervals(intervals.query_2Q[:, query], np.searchsorted(query, intervals.key_2T).astype(np.int32))


@lru_cache(maxsize=8)
def _positions(tokens: int) -> np.ndarray:
    return np.arange(tokens, dtype=np.int32)  # kept: every microbatch of a run has the same length


def _longest_first(interval: np.ndarray) -> np.ndarray:
    """Numbers of the blocks of ORDER_TOKENS tokens, by the longest interval in each."""
    length = interval[1] - interval[0]
    longest = np.maximum.reduceat(length, np.arange(0, len(length), ORDER_TOKENS)) if len(length) else length
    return np.argsort(-longest, kind="stable")


def _to_device(x: np.ndarray, device: torch.device) -> torch.Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(x))
    # From pinned memory the copy does not wait for the device.
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
