"""How many parameters a rank holds, by formula: no module is built and torch is not imported.

Shape letters of the formulas: D model width, N query heads, K key/value heads, H head width, F MLP width, V vocabulary.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from megatron_gemini.config.model import AudioConfig, ModelConfig, VisionConfig
from megatron_gemini.config.run import RunConfig
from megatron_gemini.contracts import AUDIO, VISION
from megatron_gemini.parallel.stages import stage_layers

CHANNELS = 3


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
    return _stages(config.model, vocabulary, config.data.row_tokens, parallel.tensor, count)


@functools.lru_cache(maxsize=4096)  # a search asks for the same ones again and again
def _stages(model: ModelConfig, vocabulary: int, row_tokens: int, tensor: int, count: int) -> list[Stage]:
    layer, rows = layer_parameters(model, tensor), vocabulary_parameters(model, vocabulary, tensor)
    keys = 2 * key_heads(model, tensor) * model.head_width
    inner = max(2 * model.mlp_width // tensor, model.heads * model.head_width // tensor, keys) * model.width
    found = []
    for number, span in enumerate(stage_layers(model, vocabulary, row_tokens, count)):
        first, last = number == 0, number == count - 1
        tables = first + (last and not (first and model.tie_embeddings))  # a tied head elsewhere is a second copy
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
    return -(-vocabulary // tensor) * model.width


def encoder_parameters(config: RunConfig) -> dict[str, int]:
    """Parameters of each enabled encoder, undivided, by its name in `contracts.ENCODERS`."""
    out, counts = config.model.width, {}
    if config.vision.enabled:
        counts[VISION] = _vision(config.vision, out)
    if config.audio.enabled:
        counts[AUDIO] = _audio(config.audio, out)
    return counts


def _linear(inputs: int, outputs: int, bias: bool = True) -> int:
    return inputs * outputs + (outputs if bias else 0)


def _feed_forward(width: int, inner: int) -> int:
    """With the norm before it."""
    return 2 * width + _linear(width, inner) + _linear(inner, width)


def _attention(width: int) -> int:
    """With the norm before it."""
    return 2 * width + _linear(width, 3 * width) + _linear(width, width)


@functools.lru_cache
def _vision(vision: VisionConfig, out: int) -> int:
    width = vision.width
    blocks = vision.layers * (_attention(width) + _feed_forward(width, vision.mlp_width)) + 2 * width
    ends = _linear(vision.patch**2 * CHANNELS, width) + _linear(width, width, bias=False) + _linear(width, out)
    return blocks + ends


@functools.lru_cache
def _audio(audio: AudioConfig, out: int) -> int:
    width = audio.width
    subsample = _linear(3 * audio.mels, width) + _linear(3 * width, width)
    convolution = 4 * width + _linear(width, 2 * width, bias=False) + width * audio.kernel + width * width
    block = 2 * _feed_forward(width, audio.mlp_width) + _attention(width) + convolution + 2 * width
    return subsample + audio.layers * block + _linear(width, out)
