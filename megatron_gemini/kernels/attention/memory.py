"""The cross form's metadata: which memory embeddings a packed row's tokens see, read and checked once a microbatch.

Memory is what tokens attend to without its being tokens of the row, such as an image's embeddings under gated
cross-attention (Alayrac et al., 2022). It is grouped by document, and within a document its items follow each other.

Shape suffixes: T packed tokens of the row, Q queries, M memory embeddings, S slots (see `slot_mapping`).
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch

from megatron_gemini.kernels.attention.bounds import Intervals, select_queries
from megatron_gemini.kernels.attention.documents import DocumentCalls, Run
from megatron_gemini.kernels.attention.row import RowLayout, check_integers, run_edges
from megatron_gemini.kernels.attention.slot_mapping import slots_of


def read_memory(row: RowLayout, segment_M: torch.Tensor, after_M: torch.Tensor, device: torch.device) -> Intervals:
    """Raises ValueError for what `plan.plan_cross_attention` does not take."""
    check_integers(device, segment_M=segment_M, after_M=after_M)
    segment, after = segment_M.cpu().numpy(), after_M.cpu().numpy()
    _check_memory(row, segment, after)
    tokens, memory = len(row.segment), len(segment)
    query_2T, key_2M = np.zeros((2, tokens), np.int32), np.zeros((2, memory), np.int32)
    place = {row.segment[first]: (first, last) for first, last in pairwise(row.documents.tolist()) if first < row.real}
    real = int(np.count_nonzero(segment))
    for start, end in pairwise(run_edges(segment[:real]).tolist() if real else []):
        first, last = place[segment[start]]
        # after_M ascends within a document, so what a token sees is the beginning of its document's memory.
        seen = np.searchsorted(after[start:end], np.arange(first, last), side="right")
        query_2T[:, first:last] = np.full_like(seen, start), start + seen
        key_2M[:, start:end] = np.maximum(after[start:end], first), np.full(end - start, last)
    query_2T[:, query_2T[1] <= query_2T[0]] = [[memory], [0]]
    return select_queries(Intervals(query_2T, key_2M), row.query)


def group_memory(intervals: Intervals, device: torch.device) -> DocumentCalls:
    """Runs of queries that see the same keys, which need no mask. A query that sees nothing has no slot.

    A document has as many runs as there are places in it from which on more memory is visible.
    """
    # Within a document each query sees a beginning of the memory, and no later query sees less. Runs of equal reach
    # therefore need no mask, and their keys overlap in slots, which `cpu` and `sdpa` allow.
    start_Q, reach_Q = intervals.query_2Q
    query_S = np.flatnonzero(reach_Q > start_Q)
    start_S, reach_S = start_Q[query_S], reach_Q[query_S]
    edges = (np.flatnonzero(np.diff(start_S) | np.diff(reach_S)) + 1).tolist()
    runs: list[Run] = []
    reach_of: dict[int, int] = {}  # by a document's first key: how far its queries see, the last of them farthest
    key = key_end = 0
    for first, last in pairwise([0, *edges, len(query_S)] if len(query_S) else []):
        start, reach = int(start_S[first]), int(reach_S[first])
        if start not in reach_of:
            key = key_end  # the slots of a document's keys follow those of the document before
        reach_of[start] = reach
        key_end = key + reach - start
        runs.append(Run(first, last, key, key_end, False))
    key_S = np.concatenate([np.empty(0, np.int64), *(np.arange(*held) for held in reach_of.items())])
    queries = slots_of(query_S, len(start_Q), device)
    keys = slots_of(key_S, intervals.key_2T.shape[1], device)
    return DocumentCalls(queries, keys, (), tuple(runs), len(query_S), len(key_S))


def _check_memory(row: RowLayout, segment: np.ndarray, after: np.ndarray) -> None:
    if len(segment) != len(after):
        raise ValueError(f"after_M has {len(after)} numbers and segment_M {len(segment)}; both describe one memory")
    real = int(np.count_nonzero(segment))
    if not segment[:real].all():
        raise ValueError("segment_M has padding (0) before a document; padding belongs at the end of the memory")
    segment, after = segment[:real], after[:real]
    falls = np.flatnonzero(segment[1:] < segment[:-1])
    if len(falls):
        before, at = segment[falls[0] : falls[0] + 2]
        raise ValueError(f"segment_M has document {at} after {before}; sort the memory by document, ascending")
    unknown = np.setdiff1d(segment, row.segment)
    if len(unknown):
        raise ValueError(
            f"segment_M has document {unknown[0]}, which segment_T lacks; give the memory of the row's documents only"
        )
    if real and not 0 <= after.min() <= after.max() <= len(row.segment):
        raise ValueError(
            f"after_M reaches from {after.min()} to {after.max()}; these are positions in the row, from 0 to its "
            f"length {len(row.segment)}"
        )
    back = np.flatnonzero((after[1:] < after[:-1]) & (segment[1:] == segment[:-1]))
    if len(back):
        before, at = after[back[0] : back[0] + 2]
        raise ValueError(
            f"after_M has {at} after {before} in document {segment[back[0]]}; sort a document's memory by the position "
            "from which on it is visible"
        )
