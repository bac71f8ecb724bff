"""An image before it is prepared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np


@dataclass(frozen=True, eq=False)
class Image:
    """An input image, uint8[H, W, 3]."""

    modality: ClassVar[str] = "image"
    pixels_HW3: np.ndarray

    @property
    def nbytes(self) -> int:
        return self.pixels_HW3.nbytes
