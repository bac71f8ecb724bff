"""Pictures that are alike only where they should be."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image


def smooth(seed: int, size: int = 64) -> Image.Image:
    """A picture with structure at the scale that a difference hash sees, its own for every seed."""
    coarse = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
    return Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "PNG", **options: int) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()
