"""A clip before it is prepared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np


@dataclass(frozen=True, eq=False)
class Video:
    """An input clip, uint8[F, H, W, 3], and the seconds between two of its frames."""

    modality: ClassVar[str] = "video"
    frames_FHW3: np.ndarray
    seconds_between_frames: float

    @property
    def nbytes(self) -> int:
        return self.frames_FHW3.nbytes
