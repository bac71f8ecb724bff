"""Gathered keys and values are in the order of the row, and one rank pays nothing."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_gemini.parallel.context.positions import context_positions
from megatron_gemini.parallel.context.ranks import ContextRanks, rank_order, row_order
from megatron_gemini.parallel.topology import Topology


@given(st.integers(1, 6), st.integers(1, 4), st.lists(st.integers(1, 3), max_size=2))
def test_what_the_ranks_hold_back_to_back_becomes_the_row_and_back(ranks, unit, shape):
    tokens = 2 * ranks * unit
    row = torch.randn(tokens, *shape)
    assigned = [context_positions(tokens, Topology(context_size=ranks, context_rank=rank)) for rank in range(ranks)]
    by_rank = row[torch.cat(assigned)]
    assert torch.equal(row_order(by_rank, ranks), row)
    assert torch.equal(rank_order(row, ranks), by_rank)


def test_a_single_context_rank_has_neither_copy_nor_autograd_node():
    k, v = torch.randn(2, 4, 1, 8, requires_grad=True)
    gathered = ContextRanks(Topology.serial()).gather(k, v)
    assert gathered[0] is k and gathered[1] is v
