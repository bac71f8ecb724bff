"""Routes of embeddings and gradients for every rank of a world, followed in one process.

The oracle knows nothing of routes: it asks `stream_positions` which tokens a rank has, and looks each one's item up.
"""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_gemini.parallel.context.positions import stream_positions
from megatron_gemini.parallel.encoders.assignment import Items, peers
from megatron_gemini.parallel.encoders.exchange import Route, Streams, embedding_routes, memory_routes
from megatron_gemini.parallel.topology import Topology

ROWS = 2
TRAINED = np.array([True, False])
IN_STREAM = np.array([True, True])


@st.composite
def worlds(draw):
    """(the topologies of all ranks, tokens of a row, items assigned at random)."""
    tensor, context, pipeline, data = (draw(st.integers(1, 2)) for _ in range(4))
    sequence = draw(st.booleans())
    tokens = 8 * draw(st.integers(1, 3))
    world = tensor * context * pipeline * data
    ranks = [
        Topology(
            world=world,
            rank=((p * data + d) * context + c) * tensor + t,
            tensor_size=tensor,
            tensor_rank=t,
            sequence=sequence,
            context_size=context,
            context_rank=c,
            pipeline_size=pipeline,
            pipeline_rank=p,
            data_size=data,
            data_rank=d,
        )
        for p in range(pipeline)
        for d in range(data)
        for c in range(context)
        for t in range(tensor)
    ]
    lines = []
    for home in range(data):
        for row in range(ROWS):
            start = 0
            while (start := start + draw(st.integers(0, 4))) < tokens - 4:
                outputs = draw(st.integers(1, 4))
                lines.append(
                    (draw(st.integers(0, 1)), home, row, start, 1, outputs, outputs, 0, draw(st.integers(0, world - 1)))
                )
                start += outputs
    table = np.array(sorted(lines), np.int64).reshape(-1, 9)
    return ranks, tokens, Items(*table.T)


def follow(routes: list[Route], given: list[torch.Tensor]) -> list[torch.Tensor]:
    """What `Route.carry` gives on every rank."""
    sent = [x.index_select(0, route.take).split(route.send) for route, x in zip(routes, given, strict=True)]
    found = []
    for rank, route in enumerate(routes):
        arriving = [pieces[rank] for pieces in sent]
        assert [len(piece) for piece in arriving] == route.receive
        found.append(torch.cat(arriving).index_select(0, route.arrange))
    return found


def name(item: int, offset: int) -> int:
    """A number that only this embedding has."""
    return 100 * item + offset


def made(items: Items, rank: int, encoders: tuple[int, ...] = (0, 1)) -> torch.Tensor:
    numbers = np.flatnonzero((items.rank == rank) & np.isin(items.encoder, encoders))
    every = [name(item, offset) for item in numbers for offset in range(items.outputs[item])]
    return torch.tensor(every, dtype=torch.int64).view(-1, 1)


@settings(max_examples=60, deadline=None)
@given(worlds())
def test_every_embedding_reaches_its_tokens_and_every_gradient_its_encoder_once(world):
    ranks, tokens, items = world
    routes = [embedding_routes(items, Streams(topology, tokens), ROWS, TRAINED, IN_STREAM) for topology in ranks]
    arrived = follow([route.to_decoder for route in routes], [made(items, topology.rank) for topology in ranks])
    for topology, route, found in zip(ranks, routes, arrived, strict=True):
        wanted = expected(topology, tokens, items)
        rows = np.repeat(np.arange(ROWS), route.counts).tolist()
        assert set(zip(rows, route.position.tolist(), found[:, 0].tolist(), strict=True)) == wanted
        assert len(found) == len(wanted)
    returned = follow([route.to_encoder for route in routes], arrived)
    for topology, found in zip(ranks, returned, strict=True):
        assert torch.equal(found, made(items, topology.rank, encoders=(0,)))


def expected(topology: Topology, tokens: int, items: Items) -> set[tuple[int, int, int]]:
    """{(row, position in the stream, name)} of a rank."""
    if topology.pipeline_rank:
        return set()
    stream = stream_positions(tokens, topology).tolist()
    return {
        (int(items.row[item]), stream.index(items.start[item] + offset), name(item, offset))
        for item in range(len(items.row))
        if items.home[item] == topology.data_rank
        for offset in range(items.outputs[item])
        if items.start[item] + offset in stream
    }


@given(worlds())
@settings(max_examples=20, deadline=None)
def test_a_rank_knows_where_a_token_of_another_lies(world):
    ranks, tokens, _ = world
    position = np.arange(tokens)
    for topology in ranks:
        streams = Streams(topology, tokens)
        home = np.full(tokens, topology.data_rank)
        places = {copy: streams.rank(home, position, copy) for copy in range(streams.copies)}
        for rank in peers(topology, topology.data_rank):
            there = Streams(ranks[rank], tokens).here(position)
            assert there.tolist() == [any(found[t] == rank for found in places.values()) for t in range(tokens)]


@settings(max_examples=40, deadline=None)
@given(worlds())
def test_an_encoder_whose_embeddings_are_a_memory_sends_none_into_the_stream(world):
    ranks, tokens, items = world
    in_stream = np.array([False, True])
    routes = [embedding_routes(items, Streams(topology, tokens), ROWS, TRAINED, in_stream) for topology in ranks]
    given_ = [made(items, topology.rank, encoders=(1,)) for topology in ranks]
    for topology, found in zip(ranks, follow([route.to_decoder for route in routes], given_), strict=True):
        others = {n for *_, n in expected(topology, tokens, items) if items.encoder[n // 100] == 1}
        assert set(found[:, 0].tolist()) == others


@settings(max_examples=60, deadline=None)
@given(worlds(), st.data())
def test_a_memory_reaches_every_rank_that_reads_it_and_its_gradients_are_summed(world, data):
    """All tensor- and context-parallel ranks of the reading pipeline ranks get the whole memory of their rows."""
    ranks, _, items = world
    stages = sorted(data.draw(st.sets(st.integers(0, ranks[0].pipeline_size - 1), min_size=1)))
    routes = [memory_routes(items, 0, stages, ROWS, topology) for topology in ranks]
    given_ = [made(items, topology.rank, encoders=(0,)) for topology in ranks]
    arrived = follow([route.to_decoder for route in routes], given_)
    for topology, route, found in zip(ranks, routes, arrived, strict=True):
        reads = topology.pipeline_rank in stages
        wanted = [
            (row, int(items.start[item]), name(item, offset))
            for row in range(ROWS)
            for item in np.flatnonzero((items.encoder == 0) & (items.home == topology.data_rank) & (items.row == row))
            for offset in range(items.outputs[item] if reads else 0)
        ]
        rows = np.repeat(np.arange(ROWS), route.counts).tolist()
        assert list(zip(rows, route.token.tolist(), found[:, 0].tolist(), strict=True)) == wanted
    returned = follow([route.to_encoder for route in routes], arrived)
    readers = len(stages) * ranks[0].context_size * ranks[0].tensor_size
    for route, found, mine in zip(routes, returned, given_, strict=True):
        assert torch.equal(found.view(route.copies, -1, 1).sum(0), mine * readers)
