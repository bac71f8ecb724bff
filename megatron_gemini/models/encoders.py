"""The encoders of a configuration, and what is known of an item's encoding before it is encoded.

Shape suffixes: I items, P encoder input rows, D model width, O output embeddings.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from megatron_gemini.config.engine import CostConfig, EncoderEnginesConfig
from megatron_gemini.config.run import RunConfig
from megatron_gemini.contracts import AUDIO, VISION, Media
from megatron_gemini.modalities.audio.encoder import AudioEncoder
from megatron_gemini.modalities.image.encoder import CHANNELS, VisionEncoder


def enabled(config: RunConfig) -> tuple[str, ...]:
    """Names of the encoders of a configuration, in the order in which every rank runs them."""
    return tuple(name for name, section in ((VISION, config.vision), (AUDIO, config.audio)) if section.enabled)


def is_frozen(config: RunConfig, name: str) -> bool:
    return config.vision.frozen if name == VISION else config.audio.frozen


def build_encoder(config: RunConfig, name: str) -> nn.Module:
    """One encoder, values not yet set; its output has the decoder's width."""
    if name == VISION:
        return VisionEncoder(config.vision, config.model.width)
    return AudioEncoder(config.audio, config.model.width)


class Encoders(nn.Module):
    """Some encoders of the whole model, their parameters under the names that they have there."""

    def __init__(self, config: RunConfig, names: Sequence[str]) -> None:
        super().__init__()
        self.encoders = nn.ModuleDict({name: build_encoder(config, name) for name in names})

    def forward(self, name: str, media: Media) -> torch.Tensor:
        """[O, D], the embeddings of all items of `media`, in their order."""
        return self.encoders[name](media)


def input_width(config: RunConfig, name: str) -> int:
    """Values of one encoder input: of a patch, or of a log-mel frame."""
    return config.vision.patch**2 * CHANNELS if name == VISION else config.audio.mels


def input_counts(grid_I3: np.ndarray) -> np.ndarray:
    """int64[I]: encoder inputs (patches, log-mel frames) of each item. grid_I3: as in `contracts.Media`."""
    return grid_I3.prod(axis=1)


def output_counts(name: str, grid_I3: np.ndarray) -> np.ndarray:
    """int64[I]: embeddings that the encoder gives for each item."""
    inputs_I = input_counts(grid_I3)
    return inputs_I if name == VISION else (inputs_I + 3) // 4


def costs(name: str, grid_I3: np.ndarray, config: EncoderEnginesConfig) -> np.ndarray:
    """float64[I]: what encoding each item costs, in the unit of `config`'s constants.

    Frames of a clip attend only within themselves, so that a clip costs its frames; a sound attends over all of itself.
    """
    if name == VISION:
        return grid_I3[:, 0] * _cost(grid_I3[:, 1] * grid_I3[:, 2], config.vision_cost)
    return _cost(output_counts(AUDIO, grid_I3), config.audio_cost)


def _cost(count_I: np.ndarray, cost: CostConfig) -> np.ndarray:
    n = count_I.astype(np.float64)
    return (cost.quadratic * n + cost.linear) * n + cost.constant
