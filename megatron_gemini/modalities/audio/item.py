"""A sound before it is prepared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np


@dataclass(frozen=True, eq=False)
class Audio:
    """Input sound: float32[samples], mono, 16 kHz."""

    modality: ClassVar[str] = "audio"
    wave: np.ndarray

    @property
    def nbytes(self) -> int:
        return self.wave.nbytes
