"""The whole model in one module: encoders, connectors, the decoder that reads their embeddings, and its loss.

Generation uses it as it is, and it is what every layout of ranks must equal. Training takes its parts: `DecoderStage`,
the encoders and the connectors have engines of their own, with the same names of parameters.

Shape suffixes: T packed tokens, D model width, E encoder width, O embeddings.
"""

from __future__ import annotations

import torch
from torch import nn

from megatron_gemini.config.run import RunConfig
from megatron_gemini.contracts import Batch, Media, TokenLayout
from megatron_gemini.models.decoder import AttentionCache
from megatron_gemini.models.encoders import (
    build_connector,
    build_encoder,
    dummy_media,
    gives_memory,
    run_lengths,
)
from megatron_gemini.models.placement import Memory, check_placeholders, combine
from megatron_gemini.models.stage import DecoderStage, LossOutput, StageInput, StageLoss
from megatron_gemini.parallel.tensor.layers import LayerFactory

__all__ = ["Gemini", "LossOutput"]


class Gemini(DecoderStage):
    """A decoder over text, control tokens and codes that reads images, video, audio and the like through encoders.

    After Gemini 1.0 (Gemini Team, 2023): one interleaved stream in, text and discrete image codes out.
    """

    def __init__(
        self, config: RunConfig, layout: TokenLayout, layers: LayerFactory, loss: StageLoss | None = None
    ) -> None:
        super().__init__(config, layout, layers, loss=loss)
        names = config.enabled_encoders
        self.encoders = nn.ModuleDict({name: build_encoder(config, name) for name in names})
        self.connectors = nn.ModuleDict({name: build_connector(config, name) for name in names})

    def forward(self, batch: Batch) -> LossOutput:  # type: ignore[override]
        """The loss of one packed row. An encoder without an item runs on a dummy, so its gradient is zero, not None."""
        zero = torch.zeros(())  # on the CPU: torch adds a tensor without dimensions to one on any device
        row = self._encode(batch)
        for name in self.encoders:
            if name not in batch.media:
                # With a gradient of zero Adam still moves by its momentum and decays; with None it would do nothing.
                zero = zero + 0 * self._embed(name, dummy_media(self.config, name, batch.token_T.device)).sum()
        output = super().forward(row=row)
        assert isinstance(output, LossOutput)
        return output._replace(loss=output.loss + zero)

    def hidden(self, batch: Batch, cache: AttentionCache | None = None) -> torch.Tensor:
        """Hidden states [T, D] after the final norm. cache: generation's keys and values of earlier tokens."""
        return self.through(None, self._encode(batch), cache)

    @property
    def reads_memories(self) -> bool:
        """Whether decoder layers read what connectors give beside the stream. They need it again for every token."""
        return len(self.decoder.readers) > 0

    def logits(self, h_TD: torch.Tensor) -> torch.Tensor:
        """Hidden states [..., D] -> logits [..., layout.size] of the whole vocabulary, for generation."""
        return self.decoder.output_embedding.gather_logits(self.decoder.logits(h_TD))

    def _embed(self, name: str, media: Media) -> torch.Tensor:
        # Specs count with numpy, since the planner imports no torch.
        length_S = torch.from_numpy(run_lengths(name, media.grid_I3.cpu().numpy())).to(media.grid_I3.device)
        return self.connectors[name](self.encoders[name](media), length_S)

    def _encode(self, batch: Batch) -> StageInput:
        given = {name: self._embed(name, media) for name, media in batch.media.items() if name in self.encoders}
        memories = [name for name in self.encoders if gives_memory(self.config, name)]
        # Before the embeddings are placed: `index_copy` writes wherever it is told, also over another document's text.
        check_placeholders(batch, self.layout, {name: len(e_OD) for name, e_OD in given.items()}, memories)
        stream = {name: e_OD for name, e_OD in given.items() if name not in memories}
        read = {
            name: Memory(batch.media[name].token_O, given[name]) if name in given else self._no_memory(batch)
            for name in memories
        }
        return StageInput(batch, combine(batch, stream), memories=read)

    def _no_memory(self, batch: Batch) -> Memory:
        """One embedding that no token sees, so that what reads memories runs on every row."""
        device = batch.token_T.device
        nothing = torch.zeros(1, self.config.model.width, device=device)
        return Memory(torch.full((1,), -1, device=device), nothing)
