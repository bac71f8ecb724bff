"""How many parameters a rank holds, by formula: no module is built and torch is not imported.

Shape letters of the formulas: D model width, N query heads, K key/value heads, H head width, F MLP width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

from megatron_gemini.config.model import ModelConfig
from megatron_gemini.config.run import RunConfig
from megatron_gemini.parallel.stages import stage_layers
from megatron_gemini.registry import CONNECTORS, ENCODERS


@dataclass(frozen=True)
class Stage:
    """One pipeline stage on one tensor-parallel rank.

    first: holds the embedding; last: holds the final norm and the head. largest: elements of its largest parameter.
    """

    layers: range
    first: bool
    last: bool
    parameters: int
    largest: int


def stages(config: RunConfig, vocabulary: int) -> list[Stage]:
    """The stages of the decoder in order; stage s lies on pipeline rank s mod parallel.pipeline."""
    parallel = config.parallel
    count = parallel.pipeline * parallel.virtual_stages
    found = _stages(config.model, vocabulary, config.data.row_tokens, parallel.tensor, count)
    readers = reader_parameters(config)
    if not readers:
        return found
    extra = [sum(readers.get(layer, 0) for layer in stage.layers) for stage in found]
    return [dataclasses.replace(s, parameters=s.parameters + more) for s, more in zip(found, extra, strict=True)]


@functools.lru_cache(maxsize=4096)  # a search asks for the same ones again and again
def _stages(model: ModelConfig, vocabulary: int, row_tokens: int, tensor: int, count: int) -> list[Stage]:
    layer, rows = layer_parameters(model, tensor), vocabulary_parameters(model, vocabulary, tensor)
    keys = 2 * key_heads(model, tensor) * model.head_width
    inner = max(2 * model.mlp_width // tensor, model.heads * model.head_width // tensor, keys) * model.width
    found = []
    for number, span in enumerate(stage_layers(model, vocabulary, row_tokens, count)):
        first, last = number == 0, number == count - 1
        # A tied head on another stage than the embedding is a second copy, kept equal by a sum of both gradients.
        tables = first + (last and not (first and model.tie_embeddings))
        total = len(span) * layer + tables * rows + last * model.width
        found.append(Stage(span, first, last, total, max(inner, rows if tables else 0)))
    return found


def key_heads(model: ModelConfig, tensor: int) -> int:
    """Key/value heads of a rank: its share where they divide, else all of them."""
    return model.kv_heads // tensor if model.kv_heads % tensor == 0 else model.kv_heads


def key_heads_read(model: ModelConfig, tensor: int) -> int:
    """Key/value heads that the query heads of a rank read."""
    return max(1, model.kv_heads // tensor)


def layer_parameters(model: ModelConfig, tensor: int) -> int:
    """Parameters of a decoder layer on one of `tensor` ranks."""
    queries = model.heads * model.head_width // tensor
    keys = key_heads(model, tensor) * model.head_width
    attention = model.width * (1 + 2 * queries + 2 * keys) + (2 * model.head_width if model.qk_norm else 0)
    return attention + model.width * (1 + 3 * model.mlp_width // tensor)


def vocabulary_parameters(model: ModelConfig, vocabulary: int, tensor: int) -> int:
    """Elements of an embedding or a head on one of `tensor` ranks, padding included."""
    return -(-vocabulary // tensor) * model.width  # rounded up, so that all ranks have as many rows


def encoder_parameters(config: RunConfig) -> dict[str, int]:
    """Parameters of each enabled encoder, undivided and without its connector, by its name."""
    return {name: ENCODERS.get(name).parameters(config.encoders[name]) for name in config.enabled_encoders}


def connector_parameters(config: RunConfig) -> dict[str, int]:
    """Parameters of the connector of each enabled encoder, undivided, by the encoder's name."""
    found = {}
    for name in config.enabled_encoders:
        section = config.encoders[name]
        connector, width = CONNECTORS.get(section.connector.kind), ENCODERS.get(name).output_width(section)
        found[name] = connector.parameters(section.connector, width, config.model.width)
    return found


def reading_layers(config: RunConfig) -> dict[str, tuple[int, ...]]:
    """By encoder, the decoder layers that read its connector's memory; none where it gives embeddings of the stream."""
    found: dict[str, tuple[int, ...]] = {}
    for name in config.enabled_encoders:
        section = config.encoders[name].connector
        reads = CONNECTORS.get(section.kind).reads
        found[name] = () if reads is None else reads.layers(section, config.model)
    return found


def reader_parameters(config: RunConfig) -> dict[int, int]:
    """Parameters of what reads connectors' memories, on one tensor-parallel rank, by decoder layer."""
    found: dict[int, int] = {}
    for name, layers in reading_layers(config).items():
        section = config.encoders[name].connector
        reads = CONNECTORS.get(section.kind).reads
        for layer in layers:
            assert reads is not None
            found[layer] = found.get(layer, 0) + reads.parameters(section, config.model, config.parallel.tensor)
    return found
