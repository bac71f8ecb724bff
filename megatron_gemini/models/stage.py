"""What one pipeline stage computes of one packed row: from tokens or the stage before, to the stage after or the loss.

Shape suffixes: T tokens of the row, C tokens of this context rank, S tokens of its activations between layers, D model
width, O embeddings, M embeddings of a memory.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

import torch
from torch import nn

from megatron_gemini.config.run import RunConfig
from megatron_gemini.contracts import Batch, TokenLayout
from megatron_gemini.kernels.attention.plan import (
    AttentionPlan,
    CrossAttentionPlan,
    plan_attention,
    plan_cross_attention,
)
from megatron_gemini.models.decoder import AttentionCache, Decoder, Part
from megatron_gemini.models.encoders import connector_of
from megatron_gemini.models.placement import Embeddings, Memory, place
from megatron_gemini.parallel.recompute import Recompute
from megatron_gemini.parallel.stages import stage_layers
from megatron_gemini.parallel.tensor.layers import LayerFactory
from megatron_gemini.parallel.tensor.vocabulary import Vocabulary


class LossOutput(NamedTuple):
    """Sums over the tokens of this rank's row, never means: whoever knows the global step's total weight divides.

    loss: scalar, with the graph. sums: float32 [any] without a graph, figures of the objective by name, to be added up
        over rows and ranks.
    """

    loss: torch.Tensor
    sums: dict[str, torch.Tensor]


@dataclass
class StageInput:
    """A packed row on its way through the stages of this rank.

    embeddings: what the connectors gave for its stream. own_C: the positions that this context rank has, None if all.
    memories: what connectors gave beside the stream, by the names of their encoders.
    """

    batch: Batch
    embeddings: Embeddings | None = None
    own_C: torch.Tensor | None = None
    memories: Mapping[str, Memory] = field(default_factory=dict)

    @functools.cached_property
    def plan(self) -> AttentionPlan:
        """Made once, for all stages of this rank."""
        return plan_attention(self.batch.segment_T, self.batch.span_T, self.own_C)

    @functools.cached_property
    def read_memories(self) -> dict[str, tuple[torch.Tensor, CrossAttentionPlan]]:
        """By name, the memory [M, D] and how the row's tokens see it: those of its document, behind its placeholder."""
        segment_T, found = self.batch.segment_T, {}
        for name, memory in self.memories.items():
            # A row without a memory has one embedding that nothing sees: its token is -1, its segment that of padding.
            after_M = memory.token_M.clamp(min=0)
            segment_M = torch.where(memory.token_M < 0, 0, segment_T[after_M])
            plan = plan_cross_attention(segment_T, segment_M, after_M, self.own_C)
            found[name] = (memory.e_MD, plan)
        return found

    def detached(self) -> StageInput:
        """The same row, plan and columns, for a model whose gradients do not go to the encoders."""
        embeddings = self.embeddings and Embeddings(self.embeddings.position_O, self.embeddings.e_OD.detach())
        memories = {name: Memory(memory.token_M, memory.e_MD.detach()) for name, memory in self.memories.items()}
        row = StageInput(self.batch, embeddings, self.own_C, memories)
        row.plan = self.plan  # made once for both
        return row

    def own(self, x_T: torch.Tensor) -> torch.Tensor:
        """What is this context rank's of a tensor over the row."""
        return x_T if self.own_C is None else x_T.index_select(0, self.own_C)


StageLoss: TypeAlias = Callable[[Vocabulary, torch.Tensor, StageInput], LossOutput]
"""Of the head, the final hidden states h_CD of all tokens that this context rank has, and the row."""


class DecoderStage(nn.Module):
    """The decoder, or the part of it that a pipeline stage holds, with the embedding of media and the loss.

    loss: the objective's, called on the last stage; None where no loss is wanted, as in generation.
    """

    def __init__(
        self,
        config: RunConfig,
        layout: TokenLayout,
        layers: LayerFactory,
        part: Part | None = None,
        loss: StageLoss | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.layout = layout
        self.layers = layers
        self._loss = loss
        recompute = Recompute(config.engine.recompute, config.engine.offload_activations)
        self.decoder = Decoder(config.model, layout.size, layers, part, recompute, readers(config, layers))

    def forward(self, h_SD: torch.Tensor | None = None, *, row: StageInput) -> LossOutput | tuple[torch.Tensor]:
        """h_SD: what the stage before gave, None on the first. Returns the loss on the last, else (h_SD,)."""
        h_SD = self.through(h_SD, row)
        if not self.decoder.part.last:
            return (h_SD,)  # as torch's pipeline schedules want a stage's output
        assert self._loss is not None, "a stage that was built without a loss"
        # Under sequence parallelism every token is needed against each rank's rows of the vocabulary.
        return self._loss(self.decoder.output_embedding, self.layers.gather_stream(h_SD), row)

    def through(self, h_SD: torch.Tensor | None, row: StageInput, cache: AttentionCache | None = None) -> torch.Tensor:
        """Hidden states after this stage's layers; cache: generation's keys and values of earlier tokens."""
        if h_SD is None:
            h_SD = self.decoder.embed(row.own(row.batch.token_T))
            if row.embeddings is not None:
                h_SD = place(h_SD, row.embeddings)
        # Positions of the whole row: context ranks rotate the gathered keys of all its tokens.
        return self.decoder(h_SD, row.batch.position_T, row.plan, cache, row.read_memories)


def readers(config: RunConfig, layers: LayerFactory) -> dict[int, dict[str, Callable[[], nn.Module]]]:
    """How to make the modules that read connectors' memories, by decoder layer and name of the encoder."""
    found: dict[int, dict[str, Callable[[], nn.Module]]] = {}
    for name in config.enabled_encoders:
        reads, section = connector_of(config, name).reads, config.encoders[name].connector
        for index in () if reads is None else reads.layers(section, config.model):
            assert reads is not None
            build = functools.partial(reads.build, section, config.model, layers)
            found.setdefault(index, {})[name] = build
    return found


def parts(config: RunConfig, layout: TokenLayout, stages: int) -> list[Part]:
    """The part of every pipeline stage, in order."""
    # By cost: the head over a large vocabulary is worth several layers, so the last stage gets fewer.
    split = stage_layers(config.model, layout.size, config.data.row_tokens, stages)
    return [Part(layers, first=index == 0, last=index == stages - 1) for index, layers in enumerate(split)]
