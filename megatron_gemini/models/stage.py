"""What one pipeline stage computes of one packed row: from tokens or the stage before, to the stage after or the loss.

Shape suffixes: T tokens of the row, C tokens of this context rank, S tokens of its activations between layers, D model
width, O encoder output embeddings.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from megatron_gemini.config.run import RunConfig
from megatron_gemini.contracts import MODALITIES, Batch, TokenLayout
from megatron_gemini.kernels.attention.api import AttentionPlan, plan_attention
from megatron_gemini.kernels.losses.linear_cross_entropy import linear_cross_entropy
from megatron_gemini.models.decoder import AttentionCache, Decoder, Part
from megatron_gemini.models.placement import Embeddings, place
from megatron_gemini.parallel.recompute import Recompute
from megatron_gemini.parallel.stages import stage_layers
from megatron_gemini.parallel.tensor.layers import LayerFactory


class LossOutput(NamedTuple):
    """Sums over the tokens of this rank's row, never means: whoever knows the global step's total weight divides.

    loss: sum(weight * nll) + z_loss * sum(weight * lse^2), scalar, with the graph.
    nll_by_modality, weight_by_modality: float32 [2] without a graph, sum(weight * nll) and sum(weight) of the targets
        of each of `contracts.MODALITIES`.
    """

    loss: torch.Tensor
    nll_by_modality: torch.Tensor
    weight_by_modality: torch.Tensor


@dataclass
class StageInput:
    """A packed row on its way through the stages of this rank.

    embeddings: what the encoders gave for it. own_C: the positions that this context rank has, None if all.
    """

    batch: Batch
    embeddings: Embeddings | None = None
    own_C: torch.Tensor | None = None

    @functools.cached_property
    def plan(self) -> AttentionPlan:
        """Made once, for all stages of this rank."""
        return plan_attention(self.batch.segment_T, self.batch.span_T, self.own_C)

    def own(self, x_T: torch.Tensor) -> torch.Tensor:
        """What is this context rank's of a tensor over the row."""
        return x_T if self.own_C is None else x_T.index_select(0, self.own_C)


class DecoderStage(nn.Module):
    """The decoder, or the part of it that a pipeline stage holds, with the embedding of media and the loss."""

    def __init__(self, config: RunConfig, layout: TokenLayout, layers: LayerFactory, part: Part | None = None) -> None:
        super().__init__()
        self.config = config
        self.layout = layout
        self.layers = layers
        recompute = Recompute(config.engine.recompute, config.engine.offload_activations)
        self.decoder = Decoder(config.model, layout.size, layers, part, recompute)

    def forward(self, h_SD: torch.Tensor | None = None, *, row: StageInput) -> LossOutput | tuple[torch.Tensor]:
        """h_SD: what the stage before gave, None on the first. Returns the loss on the last, else (h_SD,)."""
        h_SD = self.through(h_SD, row)
        return self.loss(h_SD, row) if self.decoder.part.last else (h_SD,)

    def through(self, h_SD: torch.Tensor | None, row: StageInput, cache: AttentionCache | None = None) -> torch.Tensor:
        """Hidden states after this stage's layers; cache: generation's keys and values of earlier tokens."""
        if h_SD is None:
            h_SD = self.decoder.embed(row.own(row.batch.token_T))
            if row.embeddings is not None:
                h_SD = place(h_SD, row.embeddings)
        return self.decoder(h_SD, row.batch.position_T, row.plan, cache)

    def loss(self, h_SD: torch.Tensor, row: StageInput) -> LossOutput:
        """The loss of this rank's tokens of a packed row. The head sees only positions whose target has a weight."""
        h_CD = self.layers.gather_stream(h_SD)
        batch = row.batch
        target, weight, modality = (row.own(x_T) for x_T in (batch.target_T, batch.weight_T, batch.modality_T))
        weighted = weight.nonzero().squeeze(1)
        if len(weighted) < len(weight):
            h_CD, target, weight, modality = (x.index_select(0, weighted) for x in (h_CD, target, weight, modality))
        loss_of = functools.partial(
            linear_cross_entropy,
            target_T=target,
            weight_T=weight,
            z_loss=self.config.loss.z_loss,
            deferred=self.config.parallel.schedule == "breadth_first",  # many rows then wait for their backward
        )
        loss, nll = self.decoder.output_embedding(h_CD, fused=loss_of)
        sums = torch.zeros(2, len(MODALITIES), dtype=torch.float32, device=weight.device)
        sums.index_add_(1, modality.int(), torch.stack((weight * nll, weight)))
        return LossOutput(loss, sums[0], sums[1])


def parts(config: RunConfig, layout: TokenLayout, stages: int) -> list[Part]:
    """The part of every pipeline stage, in order."""
    split = stage_layers(config.model, layout.size, config.data.row_tokens, stages)
    return [Part(layers, first=index == 0, last=index == stages - 1) for index, layers in enumerate(split)]
