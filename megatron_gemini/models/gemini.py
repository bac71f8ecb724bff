"""The whole model in one module: encoders, the decoder that reads their embeddings in the stream, and its loss.

Generation uses it as it is, and it is what every layout of ranks must equal. Training takes its parts: `DecoderStage`
and the encoders have engines of their own, with the same names of parameters.

Shape suffixes: T packed tokens, D model width, O encoder output embeddings.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from megatron_gemini.config.run import RunConfig
from megatron_gemini.contracts import Batch, TokenLayout
from megatron_gemini.models.decoder import AttentionCache
from megatron_gemini.models.encoders import build_encoder, enabled
from megatron_gemini.models.placement import Embeddings, check_placeholders, combine
from megatron_gemini.models.stage import DecoderStage, LossOutput, StageInput
from megatron_gemini.parallel.tensor.layers import LayerFactory

__all__ = ["Gemini", "LossOutput"]


class Gemini(DecoderStage):
    """A decoder over text, control tokens and image codes that reads images, video and audio through encoders.

    After Gemini 1.0 (Gemini Team, 2023): one interleaved stream in, text and discrete image codes out.
    """

    def __init__(self, config: RunConfig, layout: TokenLayout, layers: LayerFactory) -> None:
        super().__init__(config, layout, layers)
        self.encoders: Any = nn.ModuleDict({name: build_encoder(config, name) for name in enabled(config)})

    def forward(self, batch: Batch) -> LossOutput:  # type: ignore[override]
        """The loss of one packed row. An encoder without an item runs on a dummy, so its gradient is zero, not None."""
        given, zero = self._encode(batch), torch.zeros(())
        for name, encoder in self.encoders.items():
            if name not in batch.media:
                zero = zero + 0 * encoder(encoder.dummy()).sum()
        output = super().forward(row=StageInput(batch, given))
        assert isinstance(output, LossOutput)
        return output._replace(loss=output.loss + zero)

    def hidden(self, batch: Batch, cache: AttentionCache | None = None) -> torch.Tensor:
        """Hidden states [T, D] after the final norm. cache: generation's keys and values of earlier tokens."""
        return self.through(None, StageInput(batch, self._encode(batch)), cache)

    def logits(self, h_TD: torch.Tensor) -> torch.Tensor:
        """Hidden states [..., D] -> logits [..., layout.size] of the whole vocabulary, for generation."""
        return self.decoder.output_embedding.gather_logits(self.decoder.logits(h_TD))

    def _encode(self, batch: Batch) -> Embeddings | None:
        given = {name: self.encoders[name](media) for name, media in batch.media.items() if name in self.encoders}
        check_placeholders(batch, self.layout, {name: len(e_OD) for name, e_OD in given.items()})
        return combine(batch, given)
