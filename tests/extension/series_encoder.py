"""The toy encoder's module. Shape suffixes: P inputs, D width."""

from __future__ import annotations

import torch
from torch import nn

from megatron_gemini.contracts import Media
from megatron_gemini.kernels.attention.plan import plan_attention
from megatron_gemini.modalities.transformer import Block, linear, sinusoids
from tests.extension.series import GROUP


class SeriesEncoder(nn.Module):
    """One block over the inputs of each series."""

    like: torch.Tensor

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.input = linear(GROUP, width)
        self.block = Block(width, heads, 2 * width)
        self.register_buffer("like", torch.empty(0), persistent=False)  # the computation's dtype: see VisionEncoder

    def forward(self, media: Media) -> torch.Tensor:
        """[P, D]."""
        count_I = media.grid_I3[:, 0]
        item_P = torch.repeat_interleave(count_I, output_size=len(media.values_PC))
        place_P = torch.arange(len(item_P)) - (count_I.cumsum(0) - count_I)[item_P]
        dtype = self.like.dtype
        h_PD = self.input(media.values_PC.to(dtype))
        h_PD = h_PD + sinusoids(place_P, h_PD.shape[1]).to(dtype)
        segment_P = (item_P + 1).to(torch.int32)
        return self.block(h_PD, plan_attention(segment_P, segment_P))
