"""What tiled kernels read of a row is the mask rule of contracts.Batch, in two numbers a token."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_gemini.kernels.attention.api import plan_attention
from megatron_gemini.kernels.attention.reference import visible
from tests.attention_rows import row, rows, rows_and_queries


@settings(max_examples=100, deadline=None)
@given(rows_and_queries())
def test_the_intervals_say_what_each_query_sees_and_what_sees_each_key(given_row):
    plan = plan_attention(*given_row)
    wanted = visible(plan)
    key, query = torch.arange(plan.tokens), torch.arange(plan.queries)
    start, reach = plan.bounds.query_2Q[..., None]
    first, last = plan.bounds.key_2T
    assert torch.equal((key >= start) & (key < reach), wanted)
    assert torch.equal((query[:, None] >= first) & (query[:, None] < last), wanted)


@settings(max_examples=50, deadline=None)
@given(rows(longest=300), st.sampled_from([1, 3, 4, 16]), st.sampled_from([16, 64, 128]))
def test_every_tile_comes_once_and_the_longest_block_of_tokens_first(segment_and_span, group, block):
    bounds = plan_attention(*segment_and_span).bounds
    tokens = len(segment_and_span[0])
    order = bounds.order("query", group, block)
    assert sorted(order.tolist()) == list(range(-(-tokens * group // block)))
    length = (bounds.query_2Q[1] - bounds.query_2Q[0]).numpy()
    longest = [length[at : at + 128].max() for at in range(0, tokens, 128)]
    blocks = [tile * block // (128 * group) for tile in order.tolist()]
    work = [longest[b] for b in blocks]
    assert work == sorted(work, reverse=True) or tokens * group % block  # a last tile may begin where no token is
    assert len(np.unique(order)) == len(order)


@pytest.mark.parametrize(
    ("lengths", "spans", "padding", "wanted"),
    [
        ([3, 2], [], 2, ([0, 3, 5], 3, True, 5)),
        ([3, 2], [(0, 3), (3, 5)], 0, ([0, 3, 5], 3, False, 5)),
        ([3, 2], [(0, 3)], 0, None),
        ([3, 2], [(0, 2), (2, 3), (3, 5)], 0, None),
        ([3], [(1, 3)], 1, None),
        ([], [], 4, None),
    ],
)
def test_rows_of_documents_that_are_all_causal_or_all_seen_whole_are_sequences(lengths, spans, padding, wanted):
    found = plan_attention(*row(lengths, spans, padding)).sequences
    assert (None if found is None else (found.edges.tolist(), *found[1:])) == wanted
    assert plan_attention(*row([3], [], 0), torch.tensor([1])).sequences is None
