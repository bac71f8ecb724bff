"""The encoders and connectors on all ranks of the world, whatever the decoder's layout.

Every rank encodes its share of a global step's items. The embeddings travel to the ranks whose stream holds their
tokens, or whose layers read them as a memory. After the decoder's backward their gradients travel back.

Shape suffixes: I items, O embeddings of this rank's stream, M those of a memory, X embeddings that this rank makes, C
values of an encoder input, D model width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist

from megatron_gemini.config.run import RunConfig
from megatron_gemini.contracts import Batch, Media, StepRows
from megatron_gemini.engine.connector_engine import ConnectorEngine
from megatron_gemini.engine.deepspeed_config import deepspeed_config
from megatron_gemini.engine.encoder_engine import EncoderEngine
from megatron_gemini.engine.frozen import FrozenEngine
from megatron_gemini.engine.groups import EngineGroups
from megatron_gemini.engine.zero import ZeroEngine
from megatron_gemini.models.encoders import Encoded, gives_memory, input_width, run_lengths
from megatron_gemini.models.encoding_plan import EncodingPlan, make_plan, size_table
from megatron_gemini.models.placement import Embeddings, Memory
from megatron_gemini.parallel.encoders.exchange import (
    EmbeddingRoutes,
    MemoryRoutes,
    Streams,
    embedding_routes,
    exchange_inputs,
    memory_routes,
)
from megatron_gemini.parallel.encoders.tables import gather_tables
from megatron_gemini.parallel.topology import Topology


def groups_of_world(topology: Topology) -> EngineGroups:
    """Every rank is data parallel, none shares weights with another."""
    if topology.world == 1:
        return EngineGroups()
    # Every rank makes another group. torch would have all ranks make all of them, but for local synchronization.
    alone = dist.new_group([topology.rank], use_local_synchronization=True)
    return EngineGroups(topology.world, topology.rank, dist.group.WORLD, 1, 0, alone)


@dataclass(frozen=True)
class RowEmbeddings:
    """What this rank gets for one of its rows. stream: None if its stream has no embedding of it. memories: by encoder,
    those that layers of this rank read."""

    stream: Embeddings | None = None
    memories: Mapping[str, Memory] = field(default_factory=dict)


@dataclass(frozen=True)
class _Forward:
    """What a backward needs of its forward.

    leaves: the stream's embeddings of every row. memories: by encoder, the routes and the leaves of every row.
    """

    plan: EncodingPlan
    routes: EmbeddingRoutes
    leaves: list[torch.Tensor]
    memories: dict[str, tuple[MemoryRoutes, list[torch.Tensor]]]


class EncoderEngines:
    """All encoders and connectors of a model. Collective: every rank of the world calls every method in the same order.

    reading: by encoder, the pipeline ranks with layers that read its connector's memory; an encoder that gives
    embeddings of the stream is absent.
    """

    def __init__(
        self, config: RunConfig, topology: Topology, device: torch.device, reading: Mapping[str, Sequence[int]]
    ) -> None:
        self.config, self.topology, self.device, self.reading = config, topology, device, reading
        groups, self.names = groups_of_world(topology), config.enabled_encoders
        decoder = deepspeed_config(config, config.train.rows_per_step // topology.data_size, topology.shard_size)
        self.encoders = [EncoderEngine(config, name, groups, decoder, device) for name in self.names]
        self.connectors = ConnectorEngine(config, groups, decoder, device)
        self.balance = 1.0
        """Of the newest step: the cost of the most expensive rank over the mean."""
        dtype = torch.bfloat16 if config.engine.precision == "bf16" else torch.float32
        self._like = torch.empty(0, dtype=dtype, device=device)
        connected = [not config.encoders[name].connector.frozen for name in self.names]
        self._wanted = np.array([e.trained or c for e, c in zip(self.encoders, connected, strict=True)], bool)
        self._in_stream = np.array([not gives_memory(config, name) for name in self.names], bool)
        self._streams: dict[int, Streams] = {}
        self._last: _Forward | None = None

    @property
    def parts(self) -> list[ZeroEngine]:
        """The engines of trained encoders and connectors, which take part in the norm and the update."""
        engines = [e.engine for e in self.encoders if isinstance(e.engine, ZeroEngine)]
        return engines if self.connectors.trained is None else [*engines, self.connectors.trained]

    @property
    def frozen(self) -> list[FrozenEngine]:
        """The engines of frozen encoders and connectors, whose weights checkpoints hold."""
        engines = [e.engine for e in self.encoders if isinstance(e.engine, FrozenEngine)]
        return engines if self.connectors.frozen is None else [*engines, self.connectors.frozen]

    def forward(self, step: StepRows, training: bool = True) -> list[RowEmbeddings]:
        """What connectors give for each of this rank's rows.

        step: whole, its rows checked with `encoding_plan.check_media`. training: the embeddings are leaves that want a
        gradient, and `backward` follows the decoder's.
        """
        if not self.encoders:
            return [RowEmbeddings() for _ in step.rows]
        # Within one data group: it has every row of the step once, and all the others have the same ones.
        tables = gather_tables(size_table(step.rows, self.config), self.topology.data_group, self.device)
        plan = make_plan(tables, step.readers, self.config, self.topology, training)
        self.balance = plan.balance
        made = self._embed(plan, step.read, training)
        # By encoder, which is how the items are ordered and so what the routes' numbers count.
        in_stream = [made[name] for name, held in zip(self.names, self._in_stream, strict=True) if held]
        nothing = self._like.new_empty(0, self.config.model.width)
        tokens = len(step.rows[0].token_T)
        if tokens not in self._streams:
            self._streams[tokens] = Streams(self.topology, tokens)
        routes = embedding_routes(plan.items, self._streams[tokens], len(step.rows), self._wanted, self._in_stream)
        arrived = routes.to_decoder.carry(torch.cat([nothing, *in_stream]))
        leaves = [e_OD.detach().requires_grad_(training) for e_OD in arrived.split(routes.counts)]
        memories = {name: self._memories(plan, name, made[name], len(step.rows), training) for name in self.reading}
        if training:
            self._last = _Forward(plan, routes, leaves, memories)
        return self._by_row(routes, leaves, memories)

    def backward(self) -> None:
        """The encoders' and connectors' gradients, from those that the decoder's backward left on what `forward` gave.

        The decoder's loss was multiplied by the number of ranks that share its weights, since DeepSpeed divides by it;
        the engines here divide by the whole world.
        """
        last, self._last = self._last, None
        if last is None or not self._wanted.any():
            return
        scale = self.topology.world / self.topology.shard_size
        grads = self._gradients(last, scale)
        of_encoders = self.connectors.backward(grads)
        items = last.plan.items
        # In one order on all ranks, which under ZeRO-3 wait for each other in each encoder.
        for number, (encoder, chunks) in reversed(list(enumerate(zip(self.encoders, last.plan.chunks, strict=True)))):
            if not encoder.trained:
                continue
            mine = np.flatnonzero((items.rank == self.topology.rank) & (items.encoder == number))
            counts = items.encoded[mine].tolist()
            pieces = of_encoders[encoder.name].split(counts) if len(mine) else ()
            grad = dict(zip(mine.tolist(), pieces, strict=True))
            encoder.backward([torch.cat([grad[item] for item in chunk]) for chunk in chunks])

    def _gradients(self, last: _Forward, scale: float) -> dict[str, torch.Tensor]:
        """By encoder of which gradients are wanted, [X, D] of the embeddings that this rank made, item after item."""
        items, rank = last.plan.items, self.topology.rank
        grad_OD = torch.cat([_gradient(leaf) for leaf in last.leaves])
        arrived = last.routes.to_encoder.carry(grad_OD).float() * scale
        found: dict[str, torch.Tensor] = {}
        for number, name in enumerate(self.names):
            mine = (items.rank == rank) & (items.encoder == number)
            total = int(items.outputs[mine].sum())
            if name in last.memories:
                routes, leaves = last.memories[name]
                # In float32: the parts of all reading ranks are summed at the end of the way.
                back = routes.carry_back(torch.cat([_gradient(leaf) for leaf in leaves]).float()) * scale
                found |= {name: back} if total and self._wanted[number] else {}
            elif self._wanted[number]:
                grad, arrived = arrived[:total], arrived[total:]  # the routes keep the order of the items: by encoder
                found |= {name: grad} if total else {}
        return found

    def _embed(self, plan: EncodingPlan, read: Mapping[int, Batch], training: bool) -> dict[str, torch.Tensor]:
        """By encoder, [X, D]: the embeddings of the items that this rank encodes, item after item."""
        widths = [input_width(self.config, name) for name in self.names]
        values = exchange_inputs(self._own_values(plan, read), plan.items, widths, self.topology, self._like)
        encoded: dict[str, Encoded] = {}
        for encoder, chunks, forwards in zip(self.encoders, plan.chunks, plan.forwards, strict=True):
            outputs = encoder.forward([self._media(plan, values, chunk) for chunk in chunks], forwards, training)
            # Chunks take the longest items first, and the connector wants all of them in the items' order.
            made: dict[int, torch.Tensor] = {}
            for chunk, output in zip(chunks, outputs, strict=True):
                made |= zip(chunk, output.split(plan.items.encoded[chunk].tolist()), strict=True)
            if made:
                length_S = run_lengths(encoder.name, plan.grid_I3[sorted(made)])
                whole = torch.cat([made[item] for item in sorted(made)])
                encoded[encoder.name] = Encoded(whole, torch.from_numpy(length_S).to(self.device))
        nothing = self._like.new_empty(0, self.config.model.width)
        given = self.connectors.forward(encoded, training)
        return {name: given.get(name, nothing) for name in self.names}

    def _memories(
        self, plan: EncodingPlan, name: str, made_XD: torch.Tensor, rows: int, training: bool
    ) -> tuple[MemoryRoutes, list[torch.Tensor]]:
        number = self.names.index(name)
        routes = memory_routes(plan.items, number, self.reading[name], rows, self.topology)
        arrived = routes.to_decoder.carry(made_XD)
        return routes, [e_MD.detach().requires_grad_(training) for e_MD in arrived.split(routes.counts)]

    def _by_row(
        self,
        routes: EmbeddingRoutes,
        leaves: Sequence[torch.Tensor],
        memories: Mapping[str, tuple[MemoryRoutes, list[torch.Tensor]]],
    ) -> list[RowEmbeddings]:
        positions = routes.position.to(self.device).split(routes.counts)
        found = []
        for row, (position_O, e_OD) in enumerate(zip(positions, leaves, strict=True)):
            of_row = {}
            for name, (way, of_rows) in memories.items():
                token_M = way.token.to(self.device).split(way.counts)[row]
                e_MD = of_rows[row]
                # A row without items gets one embedding that no token sees, so that what reads it runs on every row.
                if not len(e_MD):
                    token_M = token_M.new_full((1,), -1)
                    e_MD = torch.cat([e_MD, e_MD.new_zeros(1, e_MD.shape[1])])
                of_row[name] = Memory(token_M, e_MD)
            found.append(RowEmbeddings(Embeddings(position_O, e_OD) if len(e_OD) else None, of_row))
        return found

    def _own_values(self, plan: EncodingPlan, read: Mapping[int, Batch]) -> dict[int, torch.Tensor]:
        """The inputs [n, C] of all items of the rows that this rank has read, by the items' numbers."""
        mine = np.flatnonzero(plan.items.holder == self.topology.rank)
        size = self.topology.data_size
        in_order = [read[row] for row in sorted(read, key=lambda row: (row % size, row))]  # as `Items` are
        values = [
            piece
            for name in self.names
            for batch in in_order
            if name in batch.media
            for piece in batch.media[name].values_PC.split(batch.media[name].grid_I3.prod(1).tolist())
        ]
        return dict(zip(mine.tolist(), values, strict=True))

    def _media(self, plan: EncodingPlan, values: Mapping[int, torch.Tensor], chunk: list[int]) -> Media:
        return Media(
            values_PC=torch.cat([values[item] for item in chunk]),
            grid_I3=torch.from_numpy(plan.grid_I3[chunk]).to(self.device),
            time_I=torch.from_numpy(plan.seconds_I[chunk]).to(self.device, torch.float32),
            token_O=torch.empty(0, dtype=torch.int64, device=self.device),  # an encoder has no use for it
        )


def _gradient(leaf: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
