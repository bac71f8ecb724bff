"""A toy connector that gives a memory, which some layers of the decoder read by cross-attention with one head a
rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_gemini.config.check import positive
from megatron_gemini.config.encoders import ConnectorConfig
from megatron_gemini.config.model import ModelConfig
from megatron_gemini.connectors.spec import ConnectorSpec, MemoryReader

if TYPE_CHECKING:
    from torch import nn

    from megatron_gemini.parallel.tensor.layers import LayerFactory


@dataclass(frozen=True)
class ReadingConfig(ConnectorConfig):
    """every: the memory is read before every so-manieth layer, from the second on."""

    kind: str = "reading"
    every: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "connector", "every")


def build(section: ReadingConfig, width: int, model_width: int) -> nn.Module:
    from megatron_gemini.connectors.linear.module import LinearConnector

    return LinearConnector(width, model_width)


def build_reader(section: ReadingConfig, model: ModelConfig, layers: LayerFactory) -> nn.Module:
    from tests.extension.connector_modules import Reader

    return Reader(model.width, model.heads, model.head_width, layers)


def reader_saved(
    section: ReadingConfig, model: ModelConfig, tokens: int, memory: int, tensor: int, element: int
) -> float:
    """The stream, its queries, and what attention gives; the memory with its keys and values."""
    heads = model.heads * model.head_width // tensor
    return (tokens * (model.width + 2 * heads) + memory * (model.width + 2 * heads)) * element


def reader_flops(
    section: ReadingConfig, model: ModelConfig, tokens: float, memory: float, seen: float, tensor: int
) -> float:
    """Queries and outputs of the tokens, keys and values of the memory, and two products with what a token sees."""
    heads = model.heads * model.head_width / tensor
    return 2 * heads * (2 * model.width * (tokens + memory) + 2 * tokens * seen)


READING = ConnectorSpec(
    name="reading",
    section=ReadingConfig,
    length=lambda length_S: length_S,
    parameters=lambda section, width, model_width: width * model_width + model_width,
    saved_bytes=lambda section, width, model_width, embeddings, element: float(embeddings * width * element),
    build=build,
    reads=MemoryReader(
        layers=lambda section, model: tuple(range(1, model.layers, section.every)),
        parameters=lambda section, model, tensor: 4 * model.width * model.heads * model.head_width,
        build=build_reader,
        saved_bytes=reader_saved,
        flops=reader_flops,
    ),
)
