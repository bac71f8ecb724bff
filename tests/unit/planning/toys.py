"""An encoder, two connectors and an objective that no package knows, as a plugin would add them.

Shape suffixes: E encoder width, X its embeddings, D model width, S tokens of the stream, C those of a context rank, M
embeddings of a memory.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated

import torch
from torch import nn
from torch.nn import functional as F

from megatron_gemini.config.encoders import ConnectorConfig, EncoderConfig
from megatron_gemini.config.objective import ObjectiveConfig
from megatron_gemini.config.run import RunConfig
from megatron_gemini.config.schema import Chosen
from megatron_gemini.connectors.spec import ConnectorSpec, MemoryReader
from megatron_gemini.contracts import RowFormat
from megatron_gemini.modalities.spec import EncoderSpec
from megatron_gemini.modalities.transformer import linear
from megatron_gemini.models.heads import NextTokenLoss
from megatron_gemini.models.stage import LossOutput
from megatron_gemini.objectives.spec import ObjectiveSpec, RoleSize
from megatron_gemini.parallel.parameters import constant, declare
from megatron_gemini.registry import CONNECTORS, ENCODERS, OBJECTIVES

WINDOW = 4
INT64 = 8


@dataclass(frozen=True)
class HalveConfig(ConnectorConfig):
    """Two embeddings become one."""

    kind: str = "halve"
    inner: int = 40
    """Width of its hidden layer."""


class Halve(nn.Module):
    def __init__(self, section: HalveConfig, width: int, model_width: int) -> None:
        super().__init__()
        self.up, self.down = linear(2 * width, section.inner), linear(section.inner, model_width)

    def forward(self, e_XE: torch.Tensor, length_S: torch.Tensor) -> torch.Tensor:
        even_S = length_S + length_S % 2  # a run of odd length ends with zeros
        shift_S = (even_S - length_S).cumsum(0) - (even_S - length_S)
        slot_X = torch.arange(len(e_XE)) + shift_S.repeat_interleave(length_S)
        padded = e_XE.new_zeros(int(even_S.sum()), e_XE.shape[1]).index_copy(0, slot_X, e_XE)
        return self.down(F.gelu(self.up(padded.view(len(padded) // 2, -1))))


HALVE = ConnectorSpec(
    name="halve",
    section=HalveConfig,
    length=lambda length_S: (length_S + 1) // 2,
    parameters=lambda s, width, model_width: s.inner * (2 * width + 1 + model_width) + model_width,
    # Embeddings, their places, those in place, and of every pair the hidden layer before and behind its activation.
    saved_bytes=lambda s, width, model_width, embeddings, element: (
        embeddings * (INT64 + (2 * width + s.inner) * element)
    ),
    build=Halve,
)


@dataclass(frozen=True)
class RecallConfig(ConnectorConfig):
    """Layers of the decoder read the embeddings."""

    kind: str = "recall"
    every: int = 2
    """Layers from one that reads to the next."""


class Recall(nn.Module):
    """A reader with one head, which sees the whole memory: only sizes matter here."""

    def __init__(self, section: RecallConfig, model, layers) -> None:
        super().__init__()
        self.query, self.gate = linear(model.width, model.width, bias=False), nn.Parameter(torch.zeros(1))
        declare(self.gate, constant(0.0))

    def forward(self, h_SD: torch.Tensor, memory_MD: torch.Tensor, plan) -> torch.Tensor:
        return h_SD + self.gate * (torch.softmax(self.query(h_SD) @ memory_MD.T, -1) @ memory_MD)


RECALL = ConnectorSpec(
    name="recall",
    section=RecallConfig,
    length=lambda length_S: length_S,
    parameters=lambda s, width, model_width: width * model_width + model_width,
    saved_bytes=lambda s, width, model_width, embeddings, element: embeddings * width * element,
    build=lambda s, width, model_width: Project(width, model_width),
    reads=MemoryReader(
        layers=lambda s, model: tuple(range(0, model.layers, s.every)),
        parameters=lambda s, model, tensor: model.width**2 + 1,
        build=Recall,
        # The stream, its queries, what was read, and the share of every embedding; and the memory itself.
        saved_bytes=lambda s, model, tokens, memory, tensor, element: (
            (tokens * (3 * model.width + memory) + memory * model.width) * element
        ),
        # The queries, their products with the whole memory, and the sum of it.
        flops=lambda s, model, tokens, memory, seen, tensor: 2 * tokens * model.width * (model.width + 2 * memory),
    ),
)


class Project(nn.Module):
    def __init__(self, width: int, model_width: int) -> None:
        super().__init__()
        self.projection = linear(width, model_width)

    def forward(self, e_XE: torch.Tensor, length_S: torch.Tensor) -> torch.Tensor:
        return self.projection(e_XE)


@dataclass(frozen=True)
class SeriesConfig(EncoderConfig):
    """Numbers, four at a time."""

    width: int = 24
    """Of an embedding."""
    longest: int = 1000
    connector: Annotated[ConnectorConfig, Chosen(CONNECTORS)] = field(default_factory=HalveConfig)


class Series(nn.Module):
    def __init__(self, section: SeriesConfig) -> None:
        super().__init__()
        self.up, self.out = linear(WINDOW, section.width), linear(section.width, section.width)
        self.register_buffer("like", torch.empty(0), persistent=False)

    def forward(self, media) -> torch.Tensor:
        return self.out(F.silu(self.up(media.values_PC.to(self.like.dtype))))


SERIES = EncoderSpec(
    name="series",
    section=SeriesConfig,
    input_width=lambda s: WINDOW,
    output_width=lambda s: s.width,
    spans=lambda grid_I3: (grid_I3[:, 1] * 0 + 1, grid_I3[:, 0]),
    parameters=lambda s: WINDOW * s.width + s.width + s.width**2 + s.width,
    saved_bytes=lambda s, inputs, element: inputs * (WINDOW + 2 * s.width) * element,
    largest_item=lambda s: 0,
    longest_item=lambda s: s.longest,
    build=Series,
)


@dataclass(frozen=True)
class QuietConfig(ObjectiveConfig):
    """Pretraining that keeps hidden states small."""

    kind: str = "quiet"
    penalty: float = 0.1
    """Weight of the hidden states' size."""


@dataclass(frozen=True)
class QuietLoss:
    """Of the next token, and of the size of every hidden state."""

    kinds: int
    penalty: float

    def __call__(self, head, h_CD: torch.Tensor, row) -> LossOutput:
        output = NextTokenLoss(self.kinds)(head, h_CD, row)
        return output._replace(loss=output.loss + self.penalty * torch.tanh(h_CD).sum())


def no_build(*arguments) -> None:
    raise AssertionError("planning builds no objective")


QUIET = ObjectiveSpec(
    name="quiet",
    section=QuietConfig,
    rows=lambda section: RowFormat(),
    per_step=lambda config: ("train.rows_per_step", config.train.rows_per_step),
    build=no_build,
    loss_bytes=lambda section, model, tokens, element: tokens * model.width * element,
)


@dataclass(frozen=True)
class PreferredConfig(ObjectiveConfig):
    """A loss that a reference and a value model take part in."""

    kind: str = "preferred"
    reward_layers: int = 2
    """Layers of the reward model."""


def preferred_roles(section: PreferredConfig, config: RunConfig) -> list[RoleSize]:
    """One of each kind: the policy's decoder frozen, another decoder with a head, a trained copy, a head alone."""
    smaller = dataclasses.replace(config.model, layers=section.reward_layers, width=32)
    return [
        RoleSize("reference", zero_stage=3, decoder=config.model),
        RoleSize("reward", place="last", decoder=smaller, head=smaller.width),
        RoleSize("critic", trained=True, zero_stage=2, decoder=config.model, head=config.model.width),
        RoleSize("value", place="last", trained=True, zero_stage=1, head=7),
    ]


PREFERRED = ObjectiveSpec(
    name="preferred",
    section=PreferredConfig,
    rows=lambda section: RowFormat(),
    per_step=lambda config: ("train.rows_per_step", config.train.rows_per_step),
    build=no_build,
    roles=preferred_roles,
)


def register() -> None:
    """As a plugin's module does when it is imported."""
    ENCODERS.register("series", SERIES)
    CONNECTORS.register("halve", HALVE)
    CONNECTORS.register("recall", RECALL)
    OBJECTIVES.register("quiet", QUIET)
    OBJECTIVES.register("preferred", PREFERRED)


def unregister() -> None:
    """Gone again, so that no other test sees them."""
    for registry, name in (
        (ENCODERS, "series"),
        (CONNECTORS, "halve"),
        (CONNECTORS, "recall"),
        (OBJECTIVES, "quiet"),
        (OBJECTIVES, "preferred"),
    ):
        registry.unregister(name)


@contextlib.contextmanager
def registered() -> Iterator[None]:
    """There while the block runs."""
    register()
    try:
        yield
    finally:
        unregister()
