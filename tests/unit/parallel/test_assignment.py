"""Dealing items to ranks: each once, the same everywhere, within Graham's bound, with its reader where that is free."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_gemini.parallel.encoders.assignment import assign, chunks, loads, peers, rank_at
from megatron_gemini.parallel.topology import Topology

COSTS = st.lists(st.integers(1, 60), max_size=9)


@st.composite
def problems(draw):
    """(cost_I, holder_I, ranks)"""
    ranks = draw(st.integers(1, 6))
    cost_I = np.array(draw(COSTS), np.float64)
    return cost_I, np.array([draw(st.integers(0, ranks - 1)) for _ in cost_I], np.int64), ranks


def best(cost_I, ranks):
    """The smallest possible load of the most expensive rank, by trying everything that differs."""
    found = [float(cost_I.sum())]

    def place(index, load):
        if max(load) >= found[0]:
            return
        if index == len(cost_I):
            found[0] = max(load)
            return
        for value in dict.fromkeys(load):
            rank = load.index(value)
            place(index + 1, [*load[:rank], value + cost_I[order[index]], *load[rank + 1 :]])

    order = np.argsort(-cost_I).tolist()
    place(0, [0.0] * ranks)
    return found[0]


@given(problems())
def test_the_dearest_rank_is_within_grahams_bound_of_the_best_plan(problem):
    cost_I, holder_I, ranks = problem
    rank_I = assign(cost_I, holder_I, np.zeros(ranks))
    assert rank_I.shape == cost_I.shape and ((rank_I >= 0) & (rank_I < ranks)).all()
    most_expensive = loads(cost_I, rank_I, ranks).max(initial=0.0)
    assert most_expensive <= (4 / 3 - 1 / (3 * ranks)) * best(cost_I, ranks) * (1 + 1e-8)


@given(problems())
def test_the_plan_depends_on_nothing_else(problem):
    cost_I, holder_I, ranks = problem
    first, second = (assign(cost_I.copy(), holder_I.copy(), np.zeros(ranks)) for _ in range(2))
    assert (first == second).all()


@given(st.integers(1, 6), st.integers(0, 3))
def test_equal_shares_stay_where_they_were_read(ranks, each):
    holder_I = np.repeat(np.arange(ranks), each)
    assert (assign(np.full(len(holder_I), 0.1), holder_I, np.zeros(ranks)) == holder_I).all()


def test_items_leave_their_reader_for_balance():
    rank_I = assign(np.ones(4), np.zeros(4, np.int64), np.zeros(2))
    assert sorted(rank_I.tolist()) == [0, 0, 1, 1]


def test_a_rank_that_has_more_to_do_besides_comes_last():
    rank_I = assign(np.array([2.0, 1.0]), np.zeros(2, np.int64), np.array([3.0, 1.0, 2.0]))
    assert rank_I.tolist() == [0, 1]


@given(st.lists(st.integers(1, 50), max_size=20), st.integers(1, 60))
def test_chunks_hold_every_item_once_within_the_limit(inputs, limit):
    packed = chunks(inputs, limit)
    assert sorted(itertools.chain.from_iterable(packed)) == list(range(len(inputs)))
    for chunk in packed:
        assert sum(inputs[item] for item in chunk) <= limit or len(chunk) == 1
    pairs = itertools.combinations(packed, 2)
    assert all(sum(inputs[i] for i in a + b) > limit for a, b in pairs), "two chunks that fit into one"


@pytest.mark.parametrize("sizes", list(itertools.product((1, 2), repeat=4)))
def test_peers_share_a_data_parallel_rank_and_divide_the_world(sizes):
    tensor, context, pipeline, data = sizes
    topology = Topology(tensor_size=tensor, context_size=context, pipeline_size=pipeline, data_size=data)
    everyone = [rank for d in range(data) for rank in peers(topology, d)]
    assert sorted(everyone) == list(range(tensor * context * pipeline * data))
    assert rank_at(topology, pipeline - 1, data - 1, context - 1, tensor - 1) == len(everyone) - 1
