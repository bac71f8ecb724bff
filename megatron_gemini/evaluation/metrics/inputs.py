"""What metrics judge: one class for each kind of input, and the mean that most of them end in.

Shape suffixes: H rows and W columns of pixels.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

ImageHW3 = NDArray[np.uint8]
Code = tuple[int, ...]


@dataclass(frozen=True)
class Texts:
    """What a model said, and what is right; `said[i]` answers what `right[i]` answers."""

    said: Sequence[str]
    right: Sequence[str]


@dataclass(frozen=True, eq=False)
class ImagePairs:
    """Images and the originals that they are to equal pixel by pixel, uint8[H, W, 3]; a pair has one size."""

    made: Sequence[ImageHW3]
    originals: Sequence[ImageHW3]


@dataclass(frozen=True, eq=False)
class ImageSets:
    """Drawn images and real ones, uint8[H, W, 3] of one size, and the class of each; nothing pairs them."""

    drawn: Sequence[ImageHW3]
    labels: Sequence[str]
    real: Sequence[ImageHW3]
    real_labels: Sequence[str]


@dataclass(frozen=True)
class CodedImages:
    """Images as codes of an image tokenizer, and the number of codes that there are."""

    images: Sequence[Code]
    codebook: int


@dataclass(frozen=True)
class CodeSets:
    """Images as codes, and those of the images that the model was trained on."""

    images: Sequence[Code]
    known: Collection[Code]


Inputs = Texts | ImagePairs | ImageSets | CodedImages | CodeSets


def mean(values: Iterable[float]) -> float:
    """The arithmetic mean; NaN of none, so that what could not be measured is no number in a report."""
    numbers = list(values)
    return sum(numbers) / len(numbers) if numbers else float("nan")


def normalized(text: str) -> str:
    """The text without what makes no answer wrong: case, the number of spaces, a closing mark."""
    return " ".join(text.lower().split()).rstrip(".!?")
