"""How inputs of encoders reach the ranks that encode them, how embeddings reach the ranks whose stream holds their
tokens, and how gradients go back. All of it is all-to-all over the world, by routes that every rank works out by
itself.

Shape suffixes: I items, T tokens of a row, O embeddings, X rows of any matrix, D model width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from megatron_gemini.parallel.context.positions import stream_positions
from megatron_gemini.parallel.encoders.assignment import Items, rank_at
from megatron_gemini.parallel.topology import Topology


def all_to_all(x: torch.Tensor, send: list[int], receive: list[int]) -> torch.Tensor:
    """`send[r]` rows of x to every rank r, in order; returns the rows that arrive, `receive[r]` of them from rank r."""
    if len(send) == 1:
        return x
    arrived = x.new_empty(sum(receive), *x.shape[1:])
    dist.all_to_all_single(arrived, x.contiguous(), receive, send)
    return arrived


@dataclass(frozen=True)
class Route:
    """One way of rows of a matrix between all ranks.

    take: int64, the rows to send, rank after rank. send, receive: how many go to and come from each rank.
    arrange: int64, which of the arriving rows becomes row 0, 1, ... of the result.
    """

    take: torch.Tensor
    send: list[int]
    receive: list[int]
    arrange: torch.Tensor

    @staticmethod
    def make(world: int, rows: np.ndarray, to: np.ndarray, source: np.ndarray, order: np.ndarray) -> Route:
        """rows, to: each row sent and its rank, in an order that sender and receiver share. source: in the same order,
        the rank of each row that arrives. order: which of these becomes row 0, 1, ... of the result."""
        # Stable: between two ranks both sides must keep the same order, since rows travel without their numbers.
        sending, arrival = np.argsort(to, kind="stable"), np.argsort(source, kind="stable")
        place = np.empty_like(arrival)
        place[arrival] = np.arange(len(arrival))
        return Route(
            torch.from_numpy(rows[sending]),
            np.bincount(to, minlength=world).tolist(),
            np.bincount(source, minlength=world).tolist(),
            torch.from_numpy(place[order]),
        )

    def carry(self, x_XD: torch.Tensor) -> torch.Tensor:
        """The rows that arrive on this rank, [len(arrange), D]. Every rank calls it at the same time."""
        arrived = all_to_all(x_XD.index_select(0, self.take.to(x_XD.device)), self.send, self.receive)
        return arrived.index_select(0, self.arrange.to(x_XD.device))


class Streams:
    """Which ranks' activations hold which token of a row of `tokens`, after `stream_positions`."""

    def __init__(self, topology: Topology, tokens: int) -> None:
        self.topology = topology
        self.copies = 1 if topology.sequence else topology.tensor_size  # tensor-parallel ranks with the same tokens
        self.context_T = np.empty(tokens, np.int64)
        self.tensor_T = np.zeros(tokens, np.int64)
        self.index_T = np.empty(tokens, np.int64)  # position in the stream of its rank
        for context in range(topology.context_size):
            for tensor in range(topology.tensor_size if topology.sequence else 1):
                there = dataclasses.replace(topology, context_rank=context, tensor_rank=tensor)
                position = stream_positions(tokens, there).numpy()
                self.context_T[position], self.tensor_T[position] = context, tensor
                self.index_T[position] = np.arange(len(position))

    def here(self, position: np.ndarray) -> np.ndarray:
        """bool: whether this rank's stream holds each of these positions of its rows."""
        mine = self.context_T[position] == self.topology.context_rank
        if self.copies == 1:
            mine &= self.tensor_T[position] == self.topology.tensor_rank
        # The first stage has the embedding, and with it the one stream into which media go.
        return mine & (self.topology.pipeline_rank == 0)

    def rank(self, home: np.ndarray, position: np.ndarray, copy: int | np.ndarray) -> np.ndarray:
        """The rank whose stream holds each of these positions of rows of data-parallel rank `home`.

        copy: which one of the tensor-parallel ranks, where all of them do.
        """
        tensor = self.tensor_T[position] if self.copies == 1 else np.broadcast_to(copy, position.shape)
        return rank_at(self.topology, 0, home, self.context_T[position], tensor)


@dataclass(frozen=True)
class _Tokens:
    """Embeddings of some items, back to back: the item of each, and its position in its row."""

    item: np.ndarray
    position: np.ndarray

    @staticmethod
    def of(items: Items, chosen: np.ndarray) -> _Tokens:
        count = items.outputs[chosen]
        item = np.repeat(chosen, count)
        offset = np.arange(len(item)) - np.repeat(np.cumsum(count) - count, count)
        return _Tokens(item, items.start[item] + offset)


@dataclass(frozen=True)
class EmbeddingRoutes:
    """The way of embeddings from where they are made into the streams, and that of their gradients.

    to_decoder: from this rank's embeddings, item after item, to those of its stream's tokens, row after row.
    to_encoder: from the gradients of the latter to those of the embeddings of trained encoders that this rank made.
        Where tensor-parallel ranks have the same gradient, one of them sends it, by turns.
    position: position in this rank's stream of every embedding that it gets. counts: how many of them in each row.
    """

    to_decoder: Route
    to_encoder: Route
    position: torch.Tensor
    counts: list[int]


def embedding_routes(
    items: Items, streams: Streams, rows: int, wanted: np.ndarray, in_stream: np.ndarray
) -> EmbeddingRoutes:
    """rows: of a data-parallel rank. wanted, in_stream: bool of each encoder, whether gradients of its embeddings are
    wanted, and whether they are in the stream at all."""
    topology, copies = streams.topology, streams.copies
    made = _Tokens.of(items, np.flatnonzero((items.rank == topology.rank) & in_stream[items.encoder]))
    held = _Tokens.of(items, np.flatnonzero((items.home == topology.data_rank) & in_stream[items.encoder]))
    here = streams.here(held.position)
    held = _Tokens(held.item[here], held.position[here])
    by_row = np.argsort(items.row[held.item], kind="stable")
    to = [streams.rank(items.home[made.item], made.position, copy) for copy in range(copies)]
    number = np.arange(len(made.item))
    to_decoder = Route.make(topology.world, np.tile(number, copies), np.concatenate(to), items.rank[held.item], by_row)
    to_encoder = _to_encoder(items, streams, made, held, by_row, wanted)
    position = streams.index_T[held.position[by_row]]
    counts = np.bincount(items.row[held.item], minlength=rows)
    return EmbeddingRoutes(to_decoder, to_encoder, torch.from_numpy(position), counts.tolist())


def _to_encoder(
    items: Items, streams: Streams, made: _Tokens, held: _Tokens, by_row: np.ndarray, wanted: np.ndarray
) -> Route:
    topology, copies = streams.topology, streams.copies
    sends = wanted[items.encoder[held.item]]
    if copies > 1:
        # By turns, so that the ranks share what is sent.
        sends &= held.item % copies == topology.tensor_rank
    # The inverse of `by_row`: gradients lie row after row, and are sent in the items' order.
    place = np.empty_like(by_row)
    place[by_row] = np.arange(len(by_row))
    asked = wanted[items.encoder[made.item]]
    item, position = made.item[asked], made.position[asked]
    source = streams.rank(items.home[item], position, item % copies)
    return Route.make(topology.world, place[sends], items.rank[held.item[sends]], source, np.arange(len(item)))


@dataclass(frozen=True)
class MemoryRoutes:
    """The way of the embeddings of one encoder to every rank whose layers read them, and that of their gradients.

    All tensor- and context-parallel ranks of a reading pipeline rank get the memories of their rows whole. Each
    computes a part of the gradient, so that the parts of all `copies` are summed where the embeddings were made.
    token: position in its row of the placeholder of every embedding that this rank gets. counts: how many of them in
        each row.
    """

    to_decoder: Route
    to_encoder: Route
    token: torch.Tensor
    counts: list[int]
    copies: int

    def carry_back(self, grad_MD: torch.Tensor) -> torch.Tensor:
        """The gradients of the embeddings that this rank made, item after item, summed over their readers."""
        arrived = self.to_encoder.carry(grad_MD)
        return arrived.view(self.copies, -1, arrived.shape[-1]).sum(0)


def memory_routes(
    items: Items, encoder: int, pipeline_ranks: Sequence[int], rows: int, topology: Topology
) -> MemoryRoutes:
    """pipeline_ranks: those with layers that read the memory of this encoder. rows: of a data-parallel rank."""
    of = items.encoder == encoder
    made = _Tokens.of(items, np.flatnonzero(of & (items.rank == topology.rank)))
    # A rank whose layers read nothing of it gets nothing, and takes part in the exchange all the same.
    reads = topology.pipeline_rank in pipeline_ranks
    held = _Tokens.of(items, np.flatnonzero(of & (items.home == topology.data_rank) & reads))
    by_row = np.argsort(items.row[held.item], kind="stable")
    home = items.home[made.item]
    readers = [
        rank_at(topology, pipeline, home, np.full_like(home, context), np.full_like(home, tensor))
        for pipeline in pipeline_ranks
        for context in range(topology.context_size)
        for tensor in range(topology.tensor_size)
    ]
    number, everywhere = np.arange(len(home)), np.concatenate(readers)
    source = items.rank[held.item]
    to_decoder = Route.make(topology.world, np.tile(number, len(readers)), everywhere, source, by_row)
    place = np.empty_like(by_row)
    place[by_row] = np.arange(len(by_row))
    to_encoder = Route.make(topology.world, place, source, everywhere, np.arange(len(everywhere)))
    token = torch.from_numpy(items.start[held.item[by_row]])
    counts = np.bincount(items.row[held.item], minlength=rows).tolist()
    return MemoryRoutes(to_decoder, to_encoder, token, counts, len(readers))


def exchange_inputs(
    own: dict[int, torch.Tensor], items: Items, widths: Sequence[int], topology: Topology, like: torch.Tensor
) -> dict[int, torch.Tensor]:
    """The inputs [n, C] of every item that this rank encodes, by its number.

    own: those of all items that this rank has read. widths: C of every encoder. like: tells the dtype and device in
    which they travel.
    """
    travels = items.holder != items.rank
    leaving = np.flatnonzero(travels & (items.holder == topology.rank))
    # By the other rank, and then in the items' order on both sides: values travel without their numbers.
    leaving = leaving[np.argsort(items.rank[leaving], kind="stable")]
    coming = np.flatnonzero(travels & (items.rank == topology.rank))
    coming = coming[np.argsort(items.holder[coming], kind="stable")]
    # Encoders differ in the width of an input, so that values travel flat, those of all encoders at once.
    size = items.inputs * np.array(widths, np.int64)[items.encoder]
    send, receive = (
        # numpy sums weights in float64, where numbers of values are exact up to 2^53.
        np.bincount(ranks, weights=size[chosen], minlength=topology.world).astype(np.int64).tolist()
        for ranks, chosen in ((items.rank[leaving], leaving), (items.holder[coming], coming))
    )
    flat = [own[item].to(like).reshape(-1) for item in leaving.tolist()]
    arrived = all_to_all(torch.cat(flat) if flat else like.new_empty(0), send, receive)
    pieces = arrived.split(size[coming].tolist())
    staying = np.flatnonzero(~travels & (items.rank == topology.rank))
    found = {item: own[item].to(like) for item in staying.tolist()}
    arriving = zip(coming.tolist(), pieces, strict=True)
    return found | {item: piece.view(int(items.inputs[item]), -1) for item, piece in arriving}
