"""Packed rows for tests of attention: documents, spans, memory, padding, and which queries a rank has."""

from __future__ import annotations

from itertools import pairwise

import torch
from hypothesis import strategies as st

from megatron_gemini.kernels.attention import dispatch


def row(lengths, spans, padding):
    """segment_T and span_T of documents of `lengths`, with (begin, end) spans, and padding at the end."""
    segment = torch.repeat_interleave(torch.arange(len(lengths)) + 1, torch.tensor(lengths, dtype=torch.int64))
    segment = torch.cat((segment, torch.zeros(padding, dtype=torch.int64))).int()
    span = torch.zeros_like(segment)
    for number, (begin, end) in enumerate(spans):
        span[begin:end] = number + 1
    return segment, span


def heads(keys, query, key, width=8, seed=0, queries=None, dtype=torch.float32):
    """q, k and v that require gradients; `queries`: the rows of q, if not `keys`."""
    generator = torch.Generator().manual_seed(seed)
    sizes = ((keys if queries is None else queries, query), (keys, key), (keys, key))
    return [torch.randn(t, n, width, generator=generator).to(dtype).requires_grad_() for t, n in sizes]


@st.composite
def rows(draw, longest=12, documents=6):
    """Documents, each with spans that may be adjacent, at its edges or all of it; padding behind them."""
    lengths, spans, begin = draw(st.lists(st.integers(1, longest), max_size=documents)), [], 0
    for length in lengths:
        cuts = sorted(draw(st.sets(st.integers(0, length), max_size=4)) | {0, length})
        for first, last in pairwise(cuts):
            if draw(st.booleans()):
                spans.append((begin + first, begin + last))
        begin += length
    return row(lengths, spans, draw(st.integers(0, 4)))


@st.composite
def queries_of(draw, tokens):
    """Ascending positions in a few contiguous runs: the queries of one rank among several."""
    edges = sorted(draw(st.sets(st.integers(0, tokens), max_size=4)) | {0, tokens})
    kept = [torch.arange(first, last) for first, last in pairwise(edges) if draw(st.booleans())]
    return torch.cat([torch.arange(0), *kept])


@st.composite
def rows_and_queries(draw, **sizes):
    """A row, and the queries of one rank."""
    segment, span = draw(rows(**sizes))
    return segment, span, draw(queries_of(len(segment)))


@st.composite
def rows_and_memory(draw, longest=12, documents=5):
    """The arguments of a cross plan: documents with items of some embeddings each, or with none.

    An item is visible to all of its document, from a token on, or behind the last one. Padding is behind the memory.
    """
    lengths = draw(st.lists(st.integers(1, longest), max_size=documents))
    segment_M, after_M, begin = [], [], 0
    for number, length in enumerate(lengths):
        end = begin + length
        places = sorted(draw(st.lists(st.sampled_from([0, *range(begin, end + 1)]), max_size=3)))
        for place in places:
            size = draw(st.integers(1, 5))
            segment_M += [number + 1] * size
            after_M += [place] * size
        begin = end
    padding = draw(st.integers(0, 3))
    memory = torch.tensor(segment_M + [0] * padding).int(), torch.tensor(after_M + [0] * padding, dtype=torch.int64)
    segment, _ = row(lengths, [], draw(st.integers(0, 4)))
    return segment, *memory, draw(st.none() | queries_of(len(segment)))


def only_backend(monkeypatch, name):
    """Every other backend of attention fails when it runs."""

    def refuse(other):
        def attend(*_, **__):
            raise AssertionError(f"{other} ran, not {name}")

        return attend

    kept = [b if b.name == name else b._replace(attend=refuse(b.name)) for b in dispatch.BACKENDS]
    monkeypatch.setattr(dispatch, "BACKENDS", tuple(kept))
