"""Operations on images, and on the frames of clips.

Shape suffixes: F frames, H height, W width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    from megatron_gemini.config.encoders import VisionConfig
    from megatron_gemini.modalities.image.item import Image


def resize(vision: VisionConfig, tokens: int = 0) -> Callable[[Image, np.random.Generator], Image]:
    """To whole patches at the native aspect, at most max_side a side (bicubic).

    tokens: most patches of an image; 0 for no such limit. Images are never made larger, except for the part of a patch
    that rounding adds.
    """
    from megatron_gemini.modalities.image.item import Image

    check_tokens(tokens)
    return lambda image, random: Image(resized(image.pixels_HW3[None], vision, tokens)[0])


def check_tokens(tokens: int) -> None:
    """Raise ValueError for a limit that is none."""
    if tokens < 0:
        raise ValueError(f"tokens is {tokens}; it must be 0 or more")


def size_within(height: int, width: int, patch: int, max_side: int, tokens: int) -> tuple[int, int]:
    """(height, width) in whole patches, near the native aspect, with at most `tokens` patches (0: any number)."""
    from megatron_gemini.modalities.image.preprocess import fitted_size

    fitted = fitted_size(height, width, patch, max_side)
    if not tokens or fitted[0] * fitted[1] <= tokens * patch**2:
        return fitted
    scale = math.sqrt(tokens * patch**2 / (height * width))
    rows, columns = (max(math.floor(side * scale / patch), 1) for side in (height, width))
    most = max_side // patch
    # One long side can use up the budget before the other has a patch, so the second is bounded by what is left.
    return min(rows, most, tokens) * patch, min(columns, most, tokens // min(rows, tokens)) * patch


def resized(frames_FHW3: np.ndarray, vision: VisionConfig, tokens: int) -> np.ndarray:
    """uint8[F, H, W, 3], every frame in the size of `size_within`; returned as it is where it has that size."""
    import numpy as np
    from PIL import Image as Pillow

    height, width = frames_FHW3.shape[1:3]
    size = size_within(height, width, vision.patch, vision.max_side, tokens)
    if size == (height, width):
        return frames_FHW3
    frames = [Pillow.fromarray(frame).resize(size[::-1], Pillow.Resampling.BICUBIC) for frame in frames_FHW3]
    return np.stack([np.asarray(frame) for frame in frames])


def crop(vision: VisionConfig, smallest: float = 0.8) -> Callable[[Image, np.random.Generator], Image]:
    """A random part, each side at least the share `smallest` of the whole one's."""
    from megatron_gemini.modalities.image.item import Image

    if not 0 < smallest <= 1:
        raise ValueError(f"smallest is {smallest}; it must be above 0 and at most 1")

    def change(image: Image, random: np.random.Generator) -> Image:
        sides = image.pixels_HW3.shape[:2]
        kept = [max(1, round(side * random.uniform(smallest, 1.0))) for side in sides]
        top, left = (int(random.integers(side - part + 1)) for side, part in zip(sides, kept, strict=True))
        return Image(image.pixels_HW3[top : top + kept[0], left : left + kept[1]])

    return change
