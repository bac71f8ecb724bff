"""The whole model: encoders, the decoder that reads their embeddings in the stream of tokens, and its loss.

Shape suffixes: T packed tokens, D model width, O encoder output embeddings.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from megatron_gemini.config.run import RunConfig
from megatron_gemini.contracts import AUDIO, MODALITIES, VISION, Batch, TokenLayout
from megatron_gemini.kernels.attention import plan_attention
from megatron_gemini.kernels.cross_entropy import cross_entropy
from megatron_gemini.modalities.audio.encoder import AudioEncoder
from megatron_gemini.modalities.image.encoder import VisionEncoder
from megatron_gemini.models.decoder import AttentionCache, Decoder
from megatron_gemini.models.placement import check_placeholders, place
from megatron_gemini.parallel.layers import Layers


class LossOutput(NamedTuple):
    """Sums over a row, never means: whoever knows the global step's total weight divides.

    loss: sum(weight * nll) + z_loss * sum(weight * lse^2), scalar, with the graph.
    nll_by_modality, weight_by_modality: float32 [2] without a graph, sum(weight * nll) and sum(weight) of the targets
        of each of `contracts.MODALITIES`.
    """

    loss: torch.Tensor
    nll_by_modality: torch.Tensor
    weight_by_modality: torch.Tensor


class Gemini(nn.Module):
    """A decoder over text, control tokens and image codes that reads images, video and audio through encoders.

    After Gemini 1.0 (Gemini Team, 2023): one interleaved stream in, text and discrete image codes out.
    """

    def __init__(self, config: RunConfig, layout: TokenLayout, layers: Layers) -> None:
        super().__init__()
        self.config = config
        self.layout = layout
        self.decoder = Decoder(config.model, layout.size, layers)
        self.encoders: Any = nn.ModuleDict()
        if config.vision.enabled:
            self.encoders[VISION] = VisionEncoder(config.vision, config.model.width)
        if config.audio.enabled:
            self.encoders[AUDIO] = AudioEncoder(config.audio, config.model.width)

    def forward(self, batch: Batch) -> LossOutput:
        """The loss of one packed row. The head sees only positions whose target has a weight."""
        h_TD = self.hidden(batch)
        target, weight, modality = batch.target_T, batch.weight_T, batch.modality_T
        weighted = weight.nonzero().squeeze(1)
        if len(weighted) < len(weight):
            h_TD, target, weight, modality = (x.index_select(0, weighted) for x in (h_TD, target, weight, modality))
        shard = self.decoder.output_embedding.shard
        loss, nll = cross_entropy(
            self.decoder.logits(h_TD),
            target,
            weight,
            z_loss=self.config.loss.z_loss,
            first=shard.first,
            size=shard.size,
            group=shard.group,
        )
        sums = torch.zeros(2, len(MODALITIES), dtype=torch.float32, device=weight.device)
        sums.index_add_(1, modality.int(), torch.stack((weight * nll, weight)))
        return LossOutput(loss, sums[0], sums[1])

    def hidden(self, batch: Batch, cache: AttentionCache | None = None) -> torch.Tensor:
        """Hidden states [T, D] after the final norm. cache: generation's keys and values of earlier tokens.

        Without a cache every encoder runs, on a dummy where the row has no item, so that under ZeRO-3 and in the
        gradient reductions no rank waits for another whose row holds something else.
        """
        h_TD = self._embed_media(self.decoder.embed(batch.token_T), batch, dummies=cache is None)
        plan = plan_attention(batch.segment_T, batch.span_T)
        return self.decoder(h_TD, batch.position_T, plan, cache)

    def logits(self, h_TD: torch.Tensor) -> torch.Tensor:
        """Hidden states [..., D] -> logits [..., layout.size] of the whole vocabulary, for generation."""
        return self.decoder.output_embedding.gather_logits(self.decoder.logits(h_TD))

    def _embed_media(self, h_TD: torch.Tensor, batch: Batch, dummies: bool) -> torch.Tensor:
        given = {}
        for name, encoder in self.encoders.items():
            if name in batch.media:
                given[name] = encoder(batch.media[name])
            elif dummies:
                h_TD = h_TD + 0 * encoder(encoder.dummy()).sum()
        check_placeholders(batch, self.layout, {name: len(e_OD) for name, e_OD in given.items()})
        for name, e_OD in given.items():
            h_TD = place(h_TD, e_OD, batch.media[name])
        return h_TD
