"""The USM-style audio encoder: log-mel, two stride-2 convolutions, Conformer blocks, 25 Hz out, all clips packed.

Shape suffixes: P log-mel frames of all clips, M mel bins, D encoder width, O output embeddings, S slots of a row
in which gaps of zeros separate the clips.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from megatron_gemini.config.encoders import AudioConfig
from megatron_gemini.contracts import Media
from megatron_gemini.kernels.attention.api import AttentionPlan, plan_attention
from megatron_gemini.modalities.transformer import (
    FeedForward,
    SelfAttention,
    declare_layer,
    layer_norm,
    linear,
    sinusoids,
)
from megatron_gemini.parallel.parameters import normal


class AudioEncoder(nn.Module):
    """Conformer (Gulati et al. 2020) as in USM (Zhang et al. 2023), with sinusoidal positions.

    The subsampling convolutions run over time with the mel bins as channels. Convolutions see all clips in one row
    with zeros between them, which is exactly what each clip's own zero padding would be: no clip depends on another.
    """

    like: torch.Tensor

    def __init__(self, config: AudioConfig) -> None:
        super().__init__()
        self.config = config
        self.subsample = Subsample(config.mels, config.width)
        gain = 1.0 / math.sqrt(4 * config.layers)  # four residual branches a block
        self.blocks = nn.ModuleList(
            ConformerBlock(config.width, config.heads, config.mlp_width, config.kernel, gain)
            for _ in range(config.layers)
        )
        self.register_buffer("like", torch.empty(0), persistent=False)  # dtype and device; see VisionEncoder

    def forward(self, media: Media) -> torch.Tensor:
        """[O, D]: ceil(ceil(frames / 2) / 2) embeddings a clip, clip after clip.

        Raises ValueError when the clips' lengths do not add up to the number of log-mel frames.
        """
        frames_I, total = media.grid_I3[:, 0], int(media.grid_I3[:, 0].sum())
        if total != len(media.values_PC):
            raise ValueError(
                f"{len(frames_I)} audio clips have {total} log-mel frames, but there are {len(media.values_PC)}"
            )
        h_OD, length_I = self.subsample(media.values_PC.to(self.like.dtype), frames_I)
        position_O, clip_O = _within(length_I, len(h_OD))
        h_OD = h_OD + sinusoids(position_O, self.config.width).to(h_OD.dtype)
        # Segments count from 1, and a clip is one: no embedding attends to another clip.
        segment_O = (clip_O + 1).to(torch.int32)
        plan = plan_attention(segment_O, segment_O)
        gaps = Gaps.between(length_I, len(h_OD), self.config.kernel // 2)
        for block in self.blocks:
            h_OD = block(h_OD, plan, gaps)
        return h_OD


@dataclass(frozen=True)
class Gaps:
    """A row of `slots` in which zeros separate the clips; slot_X is where each row of the packed clips goes."""

    slots: int
    slot_X: torch.Tensor

    @staticmethod
    def between(length_I: torch.Tensor, total: int, gap: int, multiple: int = 1) -> Gaps:
        """At least `gap` zeros before, between and after clips, every clip beginning at a multiple of `multiple`."""
        lead = -(-gap // multiple) * multiple
        size_I = (length_I + gap + multiple - 1) // multiple * multiple
        position_X, clip_X = _within(length_I, total)
        start_I = size_I.cumsum(0) - size_I + lead
        # An upper bound that needs no second reading of the sizes from the device.
        slots = lead + total + len(length_I) * (gap + multiple - 1)
        return Gaps(-(-slots // multiple) * multiple, start_I[clip_X] + position_X)

    def spread(self, x_XD: torch.Tensor) -> torch.Tensor:
        """[X, D] to [slots, D] with zeros in the gaps."""
        return x_XD.new_zeros(self.slots, x_XD.shape[1]).index_copy(0, self.slot_X, x_XD)

    def collect(self, x_SD: torch.Tensor) -> torch.Tensor:
        """The inverse of `spread`."""
        return x_SD.index_select(0, self.slot_X)


def _within(length_I: torch.Tensor, total: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(position within its clip, clip), int64, of each of the `total` rows of the packed clips."""
    # With the size given, repeat_interleave need not read it back from the device.
    clip_X = torch.repeat_interleave(length_I, output_size=total)
    first_I = length_I.cumsum(0) - length_I
    return torch.arange(total, device=length_I.device) - first_I[clip_X], clip_X


class Subsample(nn.Module):
    """100 Hz log-mel frames to 25 Hz rows: two convolutions of width 3 and stride 2, each followed by GELU."""

    def __init__(self, mels: int, width: int) -> None:
        super().__init__()
        self.first = _Conv1d(mels, width, 3, stride=2, bias=True)
        self.second = _Conv1d(width, width, 3, stride=2, bias=True)

    def forward(self, values_PM: torch.Tensor, frames_I: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(float[O, D], int64 rows of each clip)."""
        # Two zeros and a start at a multiple of 4 leave at least one zero after every clip at half rate as well.
        full = Gaps.between(frames_I, len(values_PM), gap=2, multiple=4)
        half_I = (frames_I + 1) // 2
        length_I = (half_I + 1) // 2
        x_MS = self.first(full.spread(values_PM).T[None])
        half_X = _halved(full.slot_X)
        # In the gaps the first convolution leaves its bias, where a clip alone would be padded with zeros: 1 where the
        # half-rate row has a clip, 0 elsewhere.
        clips_S = x_MS.new_zeros(x_MS.shape[-1]).index_fill(0, half_X, 1.0)
        x_SD = F.gelu(self.second(F.gelu(x_MS) * clips_S))[0].T
        return x_SD.index_select(0, _halved(half_X)), length_I


def _halved(slot_X: torch.Tensor) -> torch.Tensor:
    """Slots of the stride-2 convolution's outputs, given its inputs' (clips begin at even slots)."""
    return slot_X[slot_X % 2 == 0] // 2


class _Conv1d(nn.Conv1d):
    """A convolution that begins with weights of deviation 1 / sqrt(inputs of an output)."""

    def __init__(self, inputs: int, outputs: int, kernel: int, *, stride: int = 1, groups: int = 1, bias: bool) -> None:
        super().__init__(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=bias)
        declare_layer(self, normal(1.0 / math.sqrt(kernel * inputs // groups)))


class ConformerBlock(nn.Module):
    """Half a feed-forward step, attention, convolution, half a feed-forward step, norm (Gulati et al. 2020, eq. 1)."""

    def __init__(self, width: int, heads: int, mlp_width: int, kernel: int, gain: float = 1.0) -> None:
        super().__init__()
        self.mlp_1_norm, self.mlp_1 = layer_norm(width), FeedForward(width, mlp_width, nn.SiLU(), gain)
        self.attention_norm, self.attention = layer_norm(width), SelfAttention(width, heads, gain)
        self.convolution_norm, self.convolution = layer_norm(width), ConvolutionModule(width, kernel, gain)
        self.mlp_2_norm, self.mlp_2 = layer_norm(width), FeedForward(width, mlp_width, nn.SiLU(), gain)
        self.norm = layer_norm(width)

    def forward(self, x_OD: torch.Tensor, plan: AttentionPlan, gaps: Gaps) -> torch.Tensor:
        x_OD = x_OD + 0.5 * self.mlp_1(self.mlp_1_norm(x_OD))
        x_OD = x_OD + self.attention(self.attention_norm(x_OD), plan)
        x_OD = x_OD + self.convolution(self.convolution_norm(x_OD), gaps)
        x_OD = x_OD + 0.5 * self.mlp_2(self.mlp_2_norm(x_OD))
        return self.norm(x_OD)


class ConvolutionModule(nn.Module):
    """Gated linear unit, depthwise convolution over time, norm, SiLU, linear.

    The norm is a LayerNorm where the paper has a BatchNorm: batch statistics would couple the clips of a row, differ
    between data-parallel layouts, and drift under gradient accumulation.
    """

    def __init__(self, width: int, kernel: int, gain: float = 1.0) -> None:
        super().__init__()
        self.gate = linear(width, 2 * width, bias=False)
        self.depthwise = _Conv1d(width, width, kernel, groups=width, bias=False)
        self.norm = layer_norm(width)
        self.out = linear(width, width, bias=False, gain=gain)

    def forward(self, x_OD: torch.Tensor, gaps: Gaps) -> torch.Tensor:
        x_SD = gaps.spread(F.glu(self.gate(x_OD), dim=-1))
        x_OD = gaps.collect(self.depthwise(x_SD.T[None])[0].T)
        return self.out(F.silu(self.norm(x_OD)))
