"""Bytes by what they are for, and where they lie."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_gemini.planning.sizes import show_size

PARTS = ("weights", "gradients", "optimizer", "activations", "buffers")


@dataclass(frozen=True)
class Bytes:
    """Bytes of one device. buffers: what is there for a moment, the libraries' own memory, and the like."""

    weights: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0
    activations: float = 0.0
    buffers: float = 0.0

    def __add__(self, other: Bytes) -> Bytes:
        # Field by field and not by `dataclasses.fields`: a search adds hundreds of thousands of these.
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

    def __str__(self) -> str:
        """What there is of each, and the sum: `weights 2.0 GB, buffers 4.0 GB = 6.0 GB`."""
        parts = ", ".join(f"{part} {show_size(getattr(self, part))}" for part in PARTS if getattr(self, part))
        return f"{parts} = {show_size(self.total)}"


@dataclass(frozen=True)
class Footprint:
    """What one rank holds on its GPU and in its host's memory."""

    gpu: Bytes = Bytes()
    host: Bytes = Bytes()

    def __add__(self, other: Footprint) -> Footprint:
        return Footprint(self.gpu + other.gpu, self.host + other.host)
