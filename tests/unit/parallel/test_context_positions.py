"""Which tokens a rank holds: together the ranks hold each one once, and causal work is even."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_gemini.parallel.context.positions import context_positions, stream_positions
from megatron_gemini.parallel.topology import Topology


def ranks(context: int, tensor: int, sequence: bool) -> list[Topology]:
    return [
        Topology(tensor_size=tensor, tensor_rank=t, sequence=sequence, context_size=context, context_rank=c)
        for c in range(context)
        for t in range(tensor)
    ]


@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 3))
def test_the_ranks_hold_every_token_once(context, tensor, unit):
    tokens = 2 * context * tensor * unit
    held = torch.cat([stream_positions(tokens, rank) for rank in ranks(context, tensor, True)])
    assert held.sort().values.tolist() == list(range(tokens))
    for rank in ranks(context, tensor, True):
        assert stream_positions(tokens, rank).diff().gt(0).all()


@given(st.integers(1, 6), st.integers(1, 4))
def test_context_ranks_have_equal_causal_work(context, unit):
    tokens = 2 * context * unit
    work = {int((context_positions(tokens, rank) + 1).sum()) for rank in ranks(context, 1, False)}
    assert len(work) == 1


def test_without_sequence_parallelism_tensor_ranks_hold_the_same_tokens():
    first, second = (stream_positions(8, rank) for rank in ranks(1, 2, False))
    assert first.tolist() == second.tolist() == list(range(8))


def test_a_row_that_does_not_divide_is_an_error():
    with pytest.raises(ValueError, match=r"a row of 10 tokens does not divide into 2 x 2 chunks"):
        context_positions(10, ranks(2, 1, False)[0])
    with pytest.raises(ValueError, match=r"9 tokens of a row do not divide over 2 tensor-parallel ranks"):
        stream_positions(9, ranks(1, 2, True)[0])
