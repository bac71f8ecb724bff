"""A toy connector that halves the tokens: each pair of neighbors of a run becomes one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_gemini.config.encoders import ConnectorConfig
from megatron_gemini.connectors.spec import ConnectorSpec

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class HalvingConfig(ConnectorConfig):
    """It has no settings of its own."""

    kind: str = "halving"


def build(section: HalvingConfig, width: int, model_width: int) -> nn.Module:
    from tests.extension.connector_modules import Halving

    return Halving(width, model_width)


HALVING = ConnectorSpec(
    name="halving",
    section=HalvingConfig,
    length=lambda length_S: (length_S + 1) // 2,
    parameters=lambda section, width, model_width: width * model_width + model_width,
    # The embeddings, the pair of each (8 bytes), and the means.
    saved_bytes=lambda section, width, model_width, embeddings, element: embeddings * (1.5 * width * element + 8),
    build=build,
)
