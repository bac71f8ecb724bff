"""The encoders of images, clips and sound, on all ranks of the world, whatever the decoder's layout.

Every rank encodes its share of a global step's items; the embeddings travel to the ranks whose stream holds their
tokens, and after the decoder's backward their gradients travel back.

Shape suffixes: I items, O embeddings of this rank's stream, X embeddings that this rank makes, C values of an encoder
input, D model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from megatron_gemini.config.run import RunConfig
from megatron_gemini.contracts import Batch, Media, StepRows
from megatron_gemini.engine.deepspeed_config import deepspeed_config
from megatron_gemini.engine.encoder_engine import Encoder
from megatron_gemini.engine.frozen import FrozenEngine
from megatron_gemini.engine.groups import EngineGroups
from megatron_gemini.engine.zero import ZeroEngine
from megatron_gemini.models.encoders import enabled, input_width
from megatron_gemini.models.encoding_plan import EncodingPlan, make_plan, size_table
from megatron_gemini.models.placement import Embeddings
from megatron_gemini.parallel.encoders.exchange import EmbeddingRoutes, Streams, embedding_routes, exchange_inputs
from megatron_gemini.parallel.encoders.tables import gather_tables
from megatron_gemini.parallel.topology import Topology


def groups_of_world(topology: Topology) -> EngineGroups:
    """Every rank is data parallel, none shares weights with another."""
    if topology.world == 1:
        return EngineGroups()
    alone = dist.new_group([topology.rank], use_local_synchronization=True)
    return EngineGroups(topology.world, topology.rank, dist.group.WORLD, 1, 0, alone)


@dataclass(frozen=True)
class _Forward:
    """What a backward needs of its forward. leaves: the embeddings of every row that has some."""

    plan: EncodingPlan
    routes: EmbeddingRoutes
    leaves: list[torch.Tensor]


class EncoderEngines:
    """All encoders of a model. Collective: every rank of the world calls every method in the same order."""

    def __init__(self, config: RunConfig, topology: Topology, device: torch.device) -> None:
        self.config, self.topology, self.device = config, topology, device
        groups, self.names = groups_of_world(topology), enabled(config)
        decoder = deepspeed_config(config, config.train.rows_per_step // topology.data_size, topology.shard_size)
        self.encoders = [Encoder(config, name, groups, decoder, device) for name in self.names]
        self.balance = 1.0
        """Of the newest step: the cost of the most expensive rank over the mean."""
        dtype = torch.bfloat16 if config.engine.precision == "bf16" else torch.float32
        self._like = torch.empty(0, dtype=dtype, device=device)
        self._trained = np.array([encoder.trained for encoder in self.encoders], bool)
        self._streams: dict[int, Streams] = {}
        self._last: _Forward | None = None

    @property
    def parts(self) -> list[ZeroEngine]:
        """The engines of trained encoders, which take part in the norm and the update."""
        return [encoder.engine for encoder in self.encoders if encoder.trained]

    @property
    def frozen(self) -> list[FrozenEngine]:
        """The engines of frozen encoders, whose weights checkpoints hold."""
        return [encoder.engine for encoder in self.encoders if not encoder.trained]

    def forward(self, step: StepRows, training: bool = True) -> list[Embeddings | None]:
        """What the encoders give for the tokens that this rank's stream holds of each of its rows.

        step: whole, its rows checked with `encoding_plan.check_media`.
        Returns None where a stream has no media, as on all ranks without the embedding stage. training: the embeddings
        are leaves that want a gradient, and `backward` follows the decoder's.
        """
        if not self.encoders:
            return [None] * len(step.rows)
        tables = gather_tables(size_table(step.rows, self.config), self.topology.data_group, self.device)
        plan = make_plan(tables, step.readers, self.config, self.topology, training)
        self.balance = plan.balance
        made_XD = self._encode(plan, step.read, training)
        routes = embedding_routes(plan.items, self._streams_of(step.rows), len(step.rows), self._trained)
        leaves = [
            e_OD.detach().requires_grad_(training) for e_OD in routes.to_decoder.carry(made_XD).split(routes.counts)
        ]
        if training:
            self._last = _Forward(plan, routes, leaves)
        positions = routes.position.to(self.device).split(routes.counts)
        pairs = zip(positions, leaves, strict=True)
        return [Embeddings(position_O, e_OD) if len(e_OD) else None for position_O, e_OD in pairs]

    def backward(self) -> None:
        """The encoders' gradients, from those that the decoder's backward left on the embeddings of `forward`.

        The decoder's loss was multiplied by the number of ranks that share its weights, since DeepSpeed divides by it;
        the encoders' engines divide by the whole world.
        """
        last, self._last = self._last, None
        if last is None or not self._trained.any():
            return
        items = last.plan.items
        grad_OD = torch.cat([torch.zeros_like(e_OD) if e_OD.grad is None else e_OD.grad for e_OD in last.leaves])
        grad_XD = last.routes.to_encoder.carry(grad_OD).float() * (self.topology.world / self.topology.shard_size)
        mine = np.flatnonzero((items.rank == self.topology.rank) & self._trained[items.encoder])
        grads = dict(zip(mine.tolist(), grad_XD.split(items.outputs[mine].tolist()), strict=True))
        for encoder, chunks in reversed(list(zip(self.encoders, last.plan.chunks, strict=True))):
            if encoder.trained:
                encoder.backward([torch.cat([grads[item] for item in chunk]) for chunk in chunks])

    def _encode(self, plan: EncodingPlan, read: dict[int, Batch], training: bool) -> torch.Tensor:
        """[X, D]: the embeddings of the items that this rank encodes, item after item."""
        widths = [input_width(self.config, name) for name in self.names]
        values = exchange_inputs(self._own_values(plan, read), plan.items, widths, self.topology, self._like)
        made: dict[int, torch.Tensor] = {}
        for encoder, chunks, forwards in zip(self.encoders, plan.chunks, plan.forwards, strict=True):
            outputs = encoder.forward([self._media(plan, values, chunk) for chunk in chunks], forwards, training)
            for chunk, output in zip(chunks, outputs, strict=True):
                made |= zip(chunk, output.split(plan.items.outputs[chunk].tolist()), strict=True)
        nothing = self._like.new_empty(0, self.config.model.width)
        return torch.cat([nothing, *(made[item] for item in sorted(made))])

    def _own_values(self, plan: EncodingPlan, read: dict[int, Batch]) -> dict[int, torch.Tensor]:
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

    def _media(self, plan: EncodingPlan, values: dict[int, torch.Tensor], chunk: list[int]) -> Media:
        return Media(
            values_PC=torch.cat([values[item] for item in chunk]),
            grid_I3=torch.from_numpy(plan.grid_I3[chunk]).to(self.device),
            time_I=torch.from_numpy(plan.seconds_I[chunk]).to(self.device, torch.float32),
            token_O=torch.empty(0, dtype=torch.int64, device=self.device),  # an encoder has no use for it
        )

    def _streams_of(self, batches: Sequence[Batch]) -> Streams:
        tokens = len(batches[0].token_T)
        if tokens not in self._streams:
            self._streams[tokens] = Streams(self.topology, tokens)
        return self._streams[tokens]
