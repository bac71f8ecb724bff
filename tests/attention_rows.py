"""Packed rows for tests of attention: documents, spans, padding, and which queries a rank has."""

from __future__ import annotations

from itertools import pairwise

import torch
from hypothesis import strategies as st

from megatron_gemini.kernels.attention import dispatch as attention_backends


def row(lengths, spans, padding):
    """segment_T and span_T of documents of `lengths`, with (begin, end) spans, and padding at the end."""
    segment = torch.repeat_interleave(torch.arange(len(lengths)) + 1, torch.tensor(lengths, dtype=torch.int64))
    segment = torch.cat((segment, torch.zeros(padding, dtype=torch.int64))).int()
    span = torch.zeros_like(segment)
    for number, (begin, end) in enumerate(spans):
        span[begin:end] = number + 1
    return segment, span


def heads(tokens, query, key, width=8, seed=0, queries=None, dtype=torch.float32):
    """q, k and v that require gradients; `queries`: the rows of q, if not `tokens`."""
    generator = torch.Generator().manual_seed(seed)
    sizes = ((tokens if queries is None else queries, query), (tokens, key), (tokens, key))
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
def rows_and_queries(draw, **sizes):
    """A row, and ascending positions in a few contiguous runs: the queries of one rank among several."""
    segment, span = draw(rows(**sizes))
    edges = sorted(draw(st.sets(st.integers(0, len(segment)), max_size=4)) | {0, len(segment)})
    kept = [torch.arange(first, last) for first, last in pairwise(edges) if draw(st.booleans())]
    return segment, span, torch.cat([torch.arange(0), *kept])


def only_backend(monkeypatch, name):
    """Every other backend of attention fails when it runs."""

    def refuse(other):
        def attend(*_, **__):
            raise AssertionError(f"{other} ran, not {name}")

        return attend

    kept = [b if b.name == name else b._replace(attend=refuse(b.name)) for b in attention_backends.BACKENDS]
    monkeypatch.setattr(attention_backends, "BACKENDS", tuple(kept))
