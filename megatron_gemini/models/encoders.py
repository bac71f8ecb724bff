"""The encoders and connectors of a configuration, and what is known of an item's encoding before it is encoded.

Shape suffixes: I items, X encoder output embeddings, E encoder width, O embeddings for the decoder, D model width, S
spans.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from megatron_gemini.config.encoders import CostConfig
from megatron_gemini.config.run import RunConfig
from megatron_gemini.connectors.spec import ConnectorSpec
from megatron_gemini.contracts import Media
from megatron_gemini.registry import CONNECTORS, ENCODERS


class Encoded(NamedTuple):
    """What an encoder gave for some items. e_XE: their embeddings; length_S: int64, how many each run has."""

    e_XE: torch.Tensor
    length_S: torch.Tensor


def is_frozen(config: RunConfig, name: str) -> bool:
    return config.encoders[name].frozen


def connector_of(config: RunConfig, name: str) -> ConnectorSpec:
    """The connector of an encoder."""
    return CONNECTORS.get(config.encoders[name].connector.kind)


def gives_memory(config: RunConfig, name: str) -> bool:
    """Whether the encoder's connector gives a memory, and not embeddings of the stream."""
    return connector_of(config, name).reads is not None


def build_encoder(config: RunConfig, name: str) -> nn.Module:
    """One encoder, values not yet set."""
    return ENCODERS.get(name).build(config.encoders[name])


def build_connector(config: RunConfig, name: str) -> nn.Module:
    """The connector of one encoder, values not yet set; its output has the decoder's width."""
    return connector_of(config, name).build(
        config.encoders[name].connector, output_width(config, name), config.model.width
    )


class Encoders(nn.Module):
    """Some encoders of the whole model, their parameters under the names that they have there."""

    def __init__(self, config: RunConfig, names: Sequence[str]) -> None:
        super().__init__()
        self.encoders = nn.ModuleDict({name: build_encoder(config, name) for name in names})

    def forward(self, name: str, media: Media) -> torch.Tensor:
        """[X, E], the embeddings of all items of `media`, in their order."""
        return self.encoders[name](media)


class Connectors(nn.Module):
    """Some connectors of the whole model, by the names of their encoders."""

    def __init__(self, config: RunConfig, names: Sequence[str]) -> None:
        super().__init__()
        self.connectors = nn.ModuleDict({name: build_connector(config, name) for name in names})

    def forward(self, encoded: Mapping[str, Encoded]) -> dict[str, torch.Tensor]:
        """[O, D] by encoder, of all that is given."""
        return {name: self.connectors[name](*each) for name, each in encoded.items()}


def input_width(config: RunConfig, name: str) -> int:
    """Values of one encoder input."""
    return ENCODERS.get(name).input_width(config.encoders[name])


def output_width(config: RunConfig, name: str) -> int:
    """E, of an encoder's embeddings."""
    return ENCODERS.get(name).output_width(config.encoders[name])


def dummy_media(config: RunConfig, name: str, device: torch.device) -> Media:
    """One item of one input: the smallest valid input of an encoder."""
    return Media(
        values_PC=torch.zeros(1, input_width(config, name), device=device),
        grid_I3=torch.ones(1, 3, dtype=torch.int64, device=device),
        time_I=torch.zeros(1, device=device),
        # Where the embedding belongs: no encoder reads it, and a dummy's embedding goes nowhere.
        token_O=torch.zeros(1, dtype=torch.int64, device=device),
    )


def input_counts(grid_I3: np.ndarray) -> np.ndarray:
    """int64[I]: encoder inputs (patches, log-mel frames) of each item. grid_I3: as in `contracts.Media`."""
    return grid_I3.prod(axis=1)


def run_lengths(name: str, grid_I3: np.ndarray) -> np.ndarray:
    """int64[S]: embeddings of every run that the encoder gives for the items, item after item."""
    spans_I, length_I = ENCODERS.get(name).spans(grid_I3)
    return np.repeat(length_I, spans_I)


def encoded_counts(name: str, grid_I3: np.ndarray) -> np.ndarray:
    """int64[I]: embeddings that the encoder gives for each item."""
    spans_I, length_I = ENCODERS.get(name).spans(grid_I3)
    return spans_I * length_I


def output_counts(config: RunConfig, name: str, grid_I3: np.ndarray) -> np.ndarray:
    """int64[I]: embeddings that the connector makes of each item."""
    spans_I, length_I = ENCODERS.get(name).spans(grid_I3)
    return spans_I * connector_of(config, name).length(length_I)


def costs(name: str, grid_I3: np.ndarray, cost: CostConfig) -> np.ndarray:
    """float64[I]: what encoding each item costs, in the unit of `cost`.

    Embeddings of a run attend to each other and to no others, so that an item costs as much as its runs.
    """
    # Within 5% of what tools/measure_encoders.py measured on a CPU, encoder and connector together, for images of up to
    # 1,024 patches and sounds of up to 750 embeddings (docs/performance.md).
    spans_I, length_I = ENCODERS.get(name).spans(grid_I3)
    n_I = length_I.astype(np.float64)
    return spans_I * ((cost.quadratic * n_I + cost.linear) * n_I + cost.constant)
