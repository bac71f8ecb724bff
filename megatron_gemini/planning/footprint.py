"""Bytes by what they are for, and where they lie."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

PARTS = ("weights", "gradients", "optimizer", "activations", "buffers")


@dataclass(frozen=True)
class Bytes:
    """Bytes of one device. buffers: what is there for a moment, the libraries' own memory, and the like."""

    weights: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0
    activations: float = 0.0
    buffers: float = 0.0

    def __add__(self, other: Bytes) -> Bytes:  # field by field: a search adds hundreds of thousands of these
        return Bytes(
            self.weights + other.weights,
            self.gradients + other.gradients,
            self.optimizer + other.optimizer,
            self.activations + other.activations,
            self.buffers + other.buffers,
        )

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations + self.buffers


@dataclass(frozen=True)
class Footprint:
    """What one rank holds on its GPU and in its host's memory."""

    gpu: Bytes = Bytes()
    host: Bytes = Bytes()

    def __add__(self, other: Footprint) -> Footprint:
        return Footprint(self.gpu + other.gpu, self.host + other.host)

    def with_gpu(self, **parts: float) -> Footprint:
        """The same with bytes added to parts of the GPU's."""
        return dataclasses.replace(self, gpu=self.gpu + Bytes(**parts))
