"""Which rank encodes which image, clip or sound of a global step, and in how many forwards.

Every function here is a pure function of what all ranks know, so that each works out the same plan by itself.

Shape suffixes: I items of one encoder over all ranks, R ranks of the world.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from megatron_gemini.parallel.topology import Topology

_ROUNDING = 1 + 1e-9  # of sums of costs


@dataclass(frozen=True)
class Items:
    """All items of a global step and where they are encoded: int64 arrays with an entry an item.

    Their order, the same on every rank, is by encoder, data-parallel rank, row and place in the row.
    encoder: number of its encoder. home: data-parallel rank of its row. row: number among the rows of that rank. start:
    position in the row of its first embedding; the others follow, or belong to the same one if they are a memory.
    inputs, encoded, outputs: how many the encoder takes and gives, and how many the connector makes of them.
    holder: the rank that has read it. rank: the one that encodes it.
    """

    encoder: np.ndarray
    home: np.ndarray
    row: np.ndarray
    start: np.ndarray
    inputs: np.ndarray
    encoded: np.ndarray
    outputs: np.ndarray
    holder: np.ndarray
    rank: np.ndarray


Rank = TypeVar("Rank", int, np.ndarray)


def rank_at(topology: Topology, pipeline: int, data: Rank, context: Rank, tensor: Rank) -> Rank:
    """The rank, or ranks, at a place of the world; see `Topology`."""
    return ((pipeline * topology.data_size + data) * topology.context_size + context) * topology.tensor_size + tensor


def peers(topology: Topology, data_rank: int) -> list[int]:
    """The ranks that hold the rows of a data-parallel rank, ascending."""
    return [
        rank_at(topology, pipeline, data_rank, context, tensor)
        for pipeline in range(topology.pipeline_size)
        for context in range(topology.context_size)
        for tensor in range(topology.tensor_size)
    ]


def assign(cost_I: np.ndarray, holder_I: np.ndarray, load_R: np.ndarray) -> np.ndarray:
    """int64[I]: the rank that encodes each item.

    The most expensive item first, to the rank with the least to do (Graham, 1969: longest processing time first);
    equal ones in the items' order. Some rank must have the larger of the most expensive item and the mean in any plan.
    An item stays with the rank that has read it, `holder_I[i]`, whenever that rank then has no more than this. Graham's
    bound holds all the same: the most expensive rank has at most 4/3 - 1/(3 R) of what it has in the best plan.
    load_R: float64, what the ranks have to do besides, which decides between ranks with equally much of these items.
    """
    rank_I = np.zeros(len(cost_I), np.int64)
    if not len(cost_I):
        return rank_I
    bound = max(cost_I.max(), cost_I.sum() / len(load_R)) * _ROUNDING
    besides, mine = load_R.tolist(), [0.0] * len(load_R)
    # The rank's number comes last and decides between equals, so that every rank finds the same plan.
    heap = sorted((0.0, besides[rank], rank) for rank in range(len(load_R)))
    for item in np.argsort(-cost_I, kind="stable").tolist():
        cost = float(cost_I[item])
        while heap[0][0] != mine[heap[0][2]]:  # an entry of before that rank was given an item
            heapq.heappop(heap)
        rank = heap[0][2]
        holder = int(holder_I[item])
        if mine[holder] + cost <= bound or mine[holder] <= mine[rank]:
            rank = holder
        mine[rank] += cost
        heapq.heappush(heap, (mine[rank], besides[rank], rank))
        rank_I[item] = rank
    return rank_I


def loads(cost_I: np.ndarray, rank_I: np.ndarray, ranks: int) -> np.ndarray:
    """float64[R]: the cost of the items of every rank."""
    return np.bincount(rank_I, weights=cost_I, minlength=ranks)


def chunks(inputs: Sequence[int], limit: int) -> list[list[int]]:
    """The items of one rank in forwards of at most `limit` inputs; a longer item is alone. Indices into `inputs`.

    First fit, the longest first, so that the first chunks are full on every rank and the shorter last ones meet too.
    """
    packed: list[list[int]] = []
    room: list[int] = []
    for item in sorted(range(len(inputs)), key=lambda i: (-inputs[i], i)):
        chunk = next((chunk for chunk, free in enumerate(room) if inputs[item] <= free), len(packed))
        if chunk == len(packed):
            packed.append([])
            room.append(limit)
        packed[chunk].append(item)
        room[chunk] -= inputs[item]
    return packed
