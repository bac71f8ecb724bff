"""A packed row's documents and spans, read and checked on the CPU once a microbatch.

Shape suffixes: T packed tokens of the row, Q queries.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch


class RowLayout(NamedTuple):
    """Where documents and spans begin and end, in host memory.

    segment, span: of every token. query: int64 [Q], positions of the queries; None for all.
    documents: int32, where each run of one document id begins (padding is the last), and the end of the row.
    spans: the same of the span ids.
    real: tokens that are no padding.
    """

    segment: np.ndarray
    span: np.ndarray
    query: np.ndarray | None
    documents: np.ndarray
    spans: np.ndarray
    real: int


def read_row(segment_T: torch.Tensor, span_T: torch.Tensor, query_Q: torch.Tensor | None) -> RowLayout:
    """Raises ValueError for what `plan.plan_attention` does not take."""
    queries = {} if query_Q is None else {"query_Q": query_Q}
    check_integers(segment_T.device, segment_T=segment_T, span_T=span_T, **queries)
    if len(span_T) != len(segment_T):
        raise ValueError(f"span_T has {len(span_T)} tokens and segment_T {len(segment_T)}; both describe one row")
    # On a GPU this waits for the device, once a microbatch; the layers behind it never do.
    segment, span = segment_T.cpu().numpy(), span_T.cpu().numpy()
    query = None if query_Q is None else query_Q.cpu().numpy()
    row = RowLayout(segment, span, query, run_edges(segment), run_edges(span), int(np.count_nonzero(segment)))
    # All passes over the row are numpy's: of 65,536 tokens the checks take 0.06 ms (tools/bench/attention.py).
    starts = row.documents[:-1]
    ids = segment[starts] if len(segment) else segment
    if not ids[:-1].all():
        raise ValueError("segment_T has padding (0) before a document; padding belongs at the end of the row")
    _check_runs("segment_T", "document", ids, starts)
    _check_spans(row)
    if query is not None:
        _check_queries(query, len(segment))
    return row


def run_edges(x: np.ndarray) -> np.ndarray:
    """int32: where runs of one value begin, and the end."""
    inner = np.flatnonzero(x[1:] != x[:-1])
    edges = np.empty(len(inner) + 2, np.int32)
    edges[0], edges[-1] = 0, len(x)
    np.add(inner, 1, out=edges[1:-1], casting="unsafe")
    return edges


def check_integers(device: torch.device, **metadata: torch.Tensor) -> None:
    """Raises ValueError, with the argument's name, for what is not a list of integers on `device`."""
    for name, x in metadata.items():
        if x.dim() != 1:
            raise ValueError(f"{name} has shape {list(x.shape)}; it is one number a token, of shape [{name[-1]}]")
        if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
            raise ValueError(f"{name} is {x.dtype}; it holds integers, such as torch.int32")
        if x.device != device:
            raise ValueError(f"{name} is on {x.device} and segment_T on {device}; put them on one device")


def _check_spans(row: RowLayout) -> None:
    """Each nonzero id is one run, and that run lies within one document. Spans of padding alone mean nothing."""
    starts, ends = row.spans[:-1], row.spans[1:]
    ids = row.span[starts] if len(row.span) else row.span
    marked = (ids != 0) & (starts < row.real)[: len(ids)]
    if not marked.any():
        return
    starts, ends, ids = starts[marked], ends[marked], ids[marked]
    edge = row.documents[np.searchsorted(row.documents, starts, side="right")]  # where the span's document ends
    if (ends > edge).any():
        first = int(np.flatnonzero(ends > edge)[0])
        at = edge[first]
        raise ValueError(
            f"span_T has span {ids[first]} on both sides of position {at}, where document {row.segment[at - 1]} ends "
            f"and {row.segment[at] or 'the padding'} begins; a span lies within one document"
        )
    _check_runs("span_T", "span", ids, starts)


def _check_runs(name: str, thing: str, ids: np.ndarray, starts: np.ndarray) -> None:
    """An id does not come again after another."""
    # The intervals of `bounds` say what is seen for contiguous documents and spans only.
    if len(ids) == len(set(ids.tolist())):
        return
    seen: set[int] = set()
    for number, start in zip(ids.tolist(), starts.tolist(), strict=True):
        if number in seen:
            raise ValueError(
                f"{name} has {thing} {number} again at position {start}, after another; a {thing} is one contiguous run"
            )
        seen.add(number)


def _check_queries(query: np.ndarray, tokens: int) -> None:
    if len(query) and (query[0] < 0 or query[-1] >= tokens):
        raise ValueError(f"query_Q reaches from {query[0]} to {query[-1]}, but the row has positions 0 to {tokens - 1}")
    if not (query[1:] > query[:-1]).all():
        at = int(np.flatnonzero(query[1:] <= query[:-1])[0])
        raise ValueError(f"query_Q has {query[at + 1]} after {query[at]}; positions ascend, each at most once")
