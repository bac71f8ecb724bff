"""The ViT that encodes images and the frames of clips, all in one packed row.

Shape suffixes: P patches of all items, C values of a patch, D encoder width, I items, O output embeddings (O = P).
"""

from __future__ import annotations

import torch
from torch import nn

from megatron_gemini.config.encoders import VisionConfig
from megatron_gemini.contracts import Media
from megatron_gemini.kernels.attention.api import plan_attention
from megatron_gemini.modalities.transformer import Transformer, grid_positions, linear, sinusoids

CHANNELS = 3
TIME_UNIT = 0.125  # seconds: the fastest sinusoid of time then has a period of 0.8 s


class VisionEncoder(nn.Module):
    """Pre-norm ViT (Dosovitskiy et al. 2021) at native resolution (NaViT: Dehghani et al. 2023).

    Patches attend within their own image or frame. Rows and columns are told by fixed 2D sinusoids, which exist for
    every grid; a frame of a clip also carries its time in seconds.
    """

    like: torch.Tensor

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.patch = linear(config.patch * config.patch * CHANNELS, config.width)
        self.time = linear(config.width, config.width, bias=False)
        self.transformer = Transformer(config.width, config.layers, config.heads, config.mlp_width)
        # Tells the computation's dtype and device. Reading them off a weight would make ZeRO-3 gather it, on the ranks
        # that happen to read it only, and the job would hang.
        self.register_buffer("like", torch.empty(0), persistent=False)

    def forward(self, media: Media) -> torch.Tensor:
        """[P, D], one embedding a patch, in the order of `media.values_PC`.

        Raises ValueError when the grids do not add up to the number of patches.
        """
        item_P, row_P, column_P, frame_P, segment_P = _locate(media)
        dtype = self.like.dtype
        seconds_P = media.time_I[item_P] * frame_P
        h_PD = self.patch(media.values_PC.to(dtype))
        h_PD = h_PD + grid_positions(row_P, column_P, self.config.width).to(dtype)
        # Every still image has time 0 and no embedding of it; the projection runs all the same, so that ranks with
        # and without clips gather and reduce the same parameters.
        time_PD = self.time(sinusoids(seconds_P / TIME_UNIT, self.config.width).to(dtype))
        h_PD = h_PD + time_PD * (media.time_I > 0)[item_P, None]
        return self.transformer(h_PD, plan_attention(segment_P, segment_P))


def _locate(media: Media) -> tuple[torch.Tensor, ...]:
    """(item, row, column, frame within the item: int64; frame within the whole row, from 1: int32) of every patch."""
    grid_I3, patches = media.grid_I3, len(media.values_PC)
    count_I = grid_I3.prod(dim=1)
    total = int(count_I.sum())
    if total != patches:
        raise ValueError(f"the grids of {len(grid_I3)} images and clips hold {total} patches, but there are {patches}")
    item_P = torch.repeat_interleave(count_I, output_size=patches)
    first_I = count_I.cumsum(0) - count_I
    frames_before_I = grid_I3[:, 0].cumsum(0) - grid_I3[:, 0]
    offset_P = torch.arange(patches, device=grid_I3.device) - first_I[item_P]
    rows_P, columns_P = grid_I3[item_P, 1], grid_I3[item_P, 2]
    frame_P = offset_P // (rows_P * columns_P)
    segment_P = (frames_before_I[item_P] + frame_P + 1).to(torch.int32)
    return item_P, offset_P // columns_P % rows_P, offset_P % columns_P, frame_P, segment_P
