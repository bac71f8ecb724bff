"""The engine of a multimodal model: encoders over all ranks, the decoder's stages in a pipeline.

In a step every rank encodes its share of all media, and the embeddings travel to the ranks that hold the embedding
stage. After the decoder's forward and backward the embeddings' gradients travel back, for the encoders' backward. One
norm and one update end the step.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, cast

import torch

from megatron_gemini.config.run import RunConfig
from megatron_gemini.contracts import Batch, StepRows, TokenLayout
from megatron_gemini.engine.deepspeed_config import deepspeed_config
from megatron_gemini.engine.encoder_engines import EncoderEngines, RowEmbeddings
from megatron_gemini.engine.engine import Engine
from megatron_gemini.engine.groups import EngineGroups
from megatron_gemini.engine.zero import ZeroEngine
from megatron_gemini.models.stage import DecoderStage, LossOutput, Part, StageInput, StageLoss, parts, readers
from megatron_gemini.parallel.tensor.layers import LayerFactory
from megatron_gemini.parallel.topology import Topology

if TYPE_CHECKING:
    from megatron_gemini.engine.pipeline import Pipeline

Collect = Callable[[LossOutput], None]


class MultimodalEngine(Engine[StepRows, LossOutput]):
    """Trains a `Gemini` of `config`, whatever the layout of ranks."""

    def __init__(
        self, config: RunConfig, layout: TokenLayout, topology: Topology, device: torch.device, loss: StageLoss
    ) -> None:
        """loss: the objective's, of the last stage's hidden states."""
        super().__init__(config, topology, device)
        self.layers = LayerFactory(topology)
        self.settings = deepspeed_config(config, config.train.rows_per_step // topology.data_size, topology.shard_size)
        stages = parts(config, layout, topology.pipeline_size * topology.virtual_stages)
        self.encoder_engines = EncoderEngines(config, topology, device, self._reading(stages))
        self.decoder = [
            ZeroEngine(
                # Bound now: a lambda that is called later would see the part of the comprehension's last turn.
                functools.partial(DecoderStage, config, layout, self.layers, part, loss),
                config,
                EngineGroups.of_decoder(topology),
                self.settings,
                device,
            )
            for part in stages[topology.pipeline_rank :: topology.pipeline_size]
        ]
        self.parts = [*self.decoder, *self.encoder_engines.parts]
        self.frozen = self.encoder_engines.frozen
        self.pipeline: Pipeline[LossOutput] | None = None
        if topology.pipeline_size > 1:
            from megatron_gemini.engine.pipeline import Pipeline  # torch's schedules take long to import

            shape = len(self.layers.stream(config.data.row_tokens)), config.model.width
            self.between = torch.empty(shape, dtype=self.dtype, device=device, requires_grad=True)
            self.pipeline = Pipeline(self.decoder, topology, config.parallel.schedule, self.between)
        self.prepare: Callable[[list[StageInput]], None] | None = None
        """What roles do with a step's rows before the decoder sees them. The batches are the decoder's own, so that
        its loss finds in their columns what was put there. No gradient of a role passes to the encoders."""

    def _reading(self, stages: Sequence[Part]) -> dict[str, list[int]]:
        """By encoder whose connector gives a memory, the pipeline ranks with layers that read it."""
        found: dict[str, list[int]] = {}
        for number, part in enumerate(stages):
            for index, of_layer in readers(self.config, self.layers).items():
                # Virtual stages go round: stage n of the model is on pipeline rank n mod the number of ranks.
                for name in of_layer if index in part.layers else ():
                    found.setdefault(name, []).append(number % self.topology.pipeline_size)
        return {name: sorted(set(ranks)) for name, ranks in found.items()}

    def forward_backward(self, step: StepRows, weight: float, collect: Collect) -> None:
        """As `Engine.forward_backward`, of a whole step.

        Its rows have been checked (`encoding_plan.check_media`): an error of one rank alone would leave the others
        waiting.
        """
        rows = self._rows(step.rows, self.encoder_engines.forward(step, training=True))
        self._prepare(rows)
        scale = self.topology.shard_size / weight  # DeepSpeed averages over the ranks that hold the same weights
        if self.pipeline is not None:
            self.pipeline.run(rows, collect, scale)
        else:
            with self.decoder[0].kept():
                for index, row in enumerate(rows):
                    output = cast(LossOutput, self.decoder[0].forward(row=row))  # the whole decoder gives a loss
                    self.decoder[0].backward(output.loss * scale, boundary=index == len(rows) - 1)
                    collect(output)
        self.encoder_engines.backward()

    def evaluate(self, step: StepRows, collect: Collect) -> None:
        with contextlib.ExitStack() as stack:
            for part in self.parts:
                stack.enter_context(part.evaluating())
            rows = self._rows(step.rows, self.encoder_engines.forward(step, training=False))
            self._prepare(rows)
            if self.pipeline is not None:
                self.pipeline.run(rows, collect, None)
                return
            stack.enter_context(self.decoder[0].kept())
            for row in rows:
                collect(cast(LossOutput, self.decoder[0].forward(row=row)))

    def _prepare(self, rows: Sequence[StageInput]) -> None:
        if self.prepare is not None:
            # The embeddings are leaves, on which gradients of a trained role would add up with those of the policy.
            self.prepare([row.detached() for row in rows])

    def _rows(self, batches: Sequence[Batch], embeddings: Sequence[RowEmbeddings]) -> list[StageInput]:
        own_C = self.layers.context_positions(len(batches[0].token_T), self.device)
        pairs = zip(batches, embeddings, strict=True)
        return [
            StageInput(batch.without_media().to(self.device), given.stream, own_C, given.memories)
            for batch, given in pairs
        ]
