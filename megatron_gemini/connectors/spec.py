"""What stands between an encoder's output and the decoder: all that data, planner, engine and stages know of it.

A connector gives embeddings for the stream, in the places of placeholders, or a *memory*: embeddings that are in no
stream, and that layers of the decoder read as keys and values (`reads`).

Importable without torch: the functions of a spec import what they need when they are called.

Shape suffixes: S spans (runs of embeddings of one item that the encoder gives, see `modalities.spec.EncoderSpec`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

    from megatron_gemini.config.model import ModelConfig
    from megatron_gemini.parallel.tensor.layers import LayerFactory

Settings = TypeVar("Settings")


@dataclass(frozen=True)
class MemoryReader(Generic[Settings]):
    """How the decoder reads a connector's memory.

    layers: (settings, model) -> indices of the decoder layers before which it is read. parameters: (settings, model,
        tensor-parallel ranks) -> of one such place, on one rank. saved_bytes: (settings, model, tokens of the stream,
        embeddings of the memory, tensor-parallel ranks, bytes of an element) -> what autograd keeps at one such place.
    flops: (settings, model, tokens of a context rank, embeddings of the memory, how many of them a token sees on
        average, tensor-parallel ranks) -> FLOPs of one forward at one such place, on one rank.
    build: (settings, model, layers) -> a module, called with the stream [S, D], the memory [M, D] of the row and the
        cross plan of attention (`kernels.attention.plan.plan_cross_attention`); it returns the new stream. Every rank
        that runs it computes a part of the memory's gradient: the parts of all ranks are summed.
    """

    layers: Callable[[Settings, ModelConfig], tuple[int, ...]]
    parameters: Callable[[Settings, ModelConfig, int], int]
    build: Callable[[Settings, ModelConfig, LayerFactory], nn.Module]
    # Only the planner asks. A reader that does not say it is planned as if it kept nothing, and may not fit then.
    saved_bytes: Callable[[Settings, ModelConfig, int, int, int, int], float] = lambda *sizes: 0.0
    # The same: one that does not say it is planned as if it took no time.
    flops: Callable[[Settings, ModelConfig, float, float, float, int], float] = lambda *sizes: 0.0


@dataclass(frozen=True)
class ConnectorSpec(Generic[Settings]):
    """A connector: runs of an encoder's embeddings in, runs of the decoder's width out.

    section: the dataclass of its settings, a `config.encoders.ConnectorConfig`.
    length: int64 length_S -> int64, embeddings that each run becomes.
    parameters: (settings, encoder's width, decoder's width). saved_bytes: (settings, encoder's width, decoder's width,
        embeddings in, bytes of an element) -> what autograd keeps, with the embeddings themselves if it keeps those.
    build: (settings, encoder's width, decoder's width) -> a module, values not yet set, called with the encoder's
        embeddings [X, E] of whole runs and their int64 length_S; it returns [sum of length(length_S), D].
    reads: None for embeddings of the stream. Otherwise an item is one placeholder in the stream, and what this says
        reads its memory.
    """

    name: str
    section: type[Settings]
    length: Callable[[np.ndarray], np.ndarray]  # from the length alone: rows are laid out before anything is encoded
    parameters: Callable[[Settings, int, int], int]
    saved_bytes: Callable[[Settings, int, int, int, int], float]
    build: Callable[[Settings, int, int], nn.Module]
    reads: MemoryReader[Settings] | None = None
