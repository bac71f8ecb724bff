"""One linear layer from the encoder's width to the decoder's: one embedding for each of the encoder's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_gemini.config.encoders import ConnectorConfig
from megatron_gemini.connectors.spec import ConnectorSpec

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class LinearConnectorConfig(ConnectorConfig):
    """One linear layer, which has no settings of its own."""


def build(section: LinearConnectorConfig, width: int, model_width: int) -> nn.Module:
    # Here: `--help`, configuration and planner read the spec without torch.
    from megatron_gemini.connectors.linear.module import LinearConnector

    return LinearConnector(width, model_width)


LINEAR = ConnectorSpec(
    name="linear",
    section=LinearConnectorConfig,
    length=lambda length_S: length_S,
    parameters=lambda section, width, model_width: width * model_width + model_width,
    # A product keeps its input, for the weight's gradient. The bias needs nothing.
    saved_bytes=lambda section, width, model_width, embeddings, element: float(embeddings * width * element),
    build=build,
)
