"""A toy modality: short series of numbers, in JSON. Its encoder takes four numbers at a time.

Shape suffixes: I items, P inputs of four numbers, D encoder width.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from megatron_gemini.config.check import divides, positive
from megatron_gemini.config.encoders import EncoderConfig
from megatron_gemini.modalities.bad_sample import BadSample
from megatron_gemini.modalities.counting import attention, feed_forward, linear
from megatron_gemini.modalities.spec import EncoderSpec, ModalitySpec, Picture, Prepared

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

GROUP = 4
LONGEST = 64


@dataclass(frozen=True)
class SeriesConfig(EncoderConfig):
    """Off unless a run asks for it, as every encoder of a plugin should be."""

    enabled: bool = False
    width: int = 16
    heads: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "encoders.series", "width", "heads")
        divides(self.heads, self.width, "encoders.series.heads", "encoders.series.width")


@dataclass(frozen=True)
class Series:
    """A series of numbers, before it is prepared."""

    modality: ClassVar[str] = "series"
    numbers: tuple[float, ...]

    @property
    def nbytes(self) -> int:
        return 8 * len(self.numbers)


def decode(data: bytes, section: SeriesConfig) -> Series:
    """A list of numbers in JSON. Raises BadSample, whatever else the file holds."""
    try:
        numbers = [float(number) for number in json.loads(data)]
    except (ValueError, TypeError, OverflowError, RecursionError):
        numbers = []
    if not 0 < len(numbers) <= LONGEST or not all(map(math.isfinite, numbers)):
        raise BadSample("bad_series", f"a series is a list of 1 to {LONGEST} numbers")
    return Series(tuple(numbers))


def prepare(series: Series, section: SeriesConfig) -> Prepared:
    import torch

    numbers = [*series.numbers, *[0.0] * (-len(series.numbers) % GROUP)]
    values_PC = torch.tensor(numbers).view(-1, GROUP)
    return Prepared(values_PC, (len(values_PC), 1, 1))


def picture(prepared: Prepared, section: SeriesConfig) -> Picture:
    return Picture(spectrum_LM=prepared.values_PC.numpy())


def spans(grid_I3: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One run an item, of an embedding for each input."""
    return grid_I3[:, 0] * 0 + 1, grid_I3[:, 0]


def build(section: SeriesConfig) -> nn.Module:
    from tests.extension.series_encoder import SeriesEncoder

    return SeriesEncoder(section.width, section.heads)


def parameters(section: SeriesConfig) -> int:
    width = section.width
    return linear(GROUP, width) + attention(width) + feed_forward(width, 2 * width)


def saved_bytes(section: SeriesConfig, inputs: int, element: int) -> float:
    """The block as the vision encoder's: eight times the width, and twice the inner one."""
    return inputs * ((8 + 2 * 2 + 1) * section.width + GROUP) * element


SERIES_ENCODER = EncoderSpec(
    name="series",
    section=SeriesConfig,
    input_width=lambda section: GROUP,
    output_width=lambda section: section.width,
    spans=spans,
    parameters=parameters,
    saved_bytes=saved_bytes,
    largest_item=lambda section: LONGEST // GROUP,
    longest_item=lambda section: LONGEST // GROUP,
    build=build,
)
SERIES = ModalitySpec(
    name="series",
    encoder="series",
    members=("series.json", "series"),
    files="JSON",
    decode=decode,
    prepare=prepare,
    picture=picture,
)
