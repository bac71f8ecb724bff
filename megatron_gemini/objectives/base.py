"""What the training loop calls: the half of an objective above the engine.

A loop reads, agrees, trains, records and saves; it knows no objective by name. An objective has the engine, the data
and the figures.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Generic, TypeVar

import torch

from megatron_gemini.checkpoint.save import Asset
from megatron_gemini.config.run import RunConfig
from megatron_gemini.config.schema import Plain
from megatron_gemini.engine.engine import Engine
from megatron_gemini.engine.synchronize import StepFingerprint
from megatron_gemini.parallel.topology import Topology

Step = TypeVar("Step")
"""What a rank has of a global step."""
Output = TypeVar("Output")
"""What the loss gives for a microbatch."""


class Objective(ABC, Generic[Step, Output]):
    """One kind of training. `engine` exists after construction."""

    engine: Engine

    def __init__(self, config: RunConfig, topology: Topology, device: torch.device) -> None:
        self.config, self.topology, self.device = config, topology, device
        self.run_dir = Path(config.train.output_dir)

    @abstractmethod
    def read(self) -> tuple[Step, str]:
        """(what this rank has of the next global step, on the CPU; why that cannot be trained on, empty if it can)."""

    @abstractmethod
    def weight(self, step: Step) -> float:
        """Sum of the loss weights of this rank's microbatches."""

    @abstractmethod
    def fingerprint(self, number: int, step: Step) -> StepFingerprint:
        """What this rank is about to do in a step, which must fit what the others are about to do."""

    def to_device(self, step: Step) -> Step:
        """The step where the engine wants it; packed rows stay, since it takes what a rank needs of them."""
        return step

    # Figures are added up over ranks before anything is divided: a mean of means would weigh ranks and not tokens.
    @abstractmethod
    def sums(self, outputs: Sequence[Output], step: Step) -> dict[str, float]:
        """What this rank adds to the figures of a step, zeros where another rank counts the same.

        outputs: none on a rank that does not hold the loss.
        """

    @abstractmethod
    def record(self, sums: Mapping[str, float]) -> dict[str, float]:
        """What to log, from the sums over all ranks; has "loss" and "tokens"."""

    @abstractmethod
    def data_state(self) -> dict[str, Plain]:
        """State of this rank's data lanes by lane number; where ranks share lanes, the same on each."""

    @abstractmethod
    def load_data_state(self, state: Mapping[str, Plain]) -> None: ...

    @abstractmethod
    def skipped(self) -> Counter[tuple[str, str]]:
        """Samples that this rank alone read and could not use since the run began, by (source, reason)."""

    def utilization(self, record: Mapping[str, float], seconds: float) -> dict[str, float]:
        """{"mfu": share of the devices' peak} where that is known."""
        return {}

    @abstractmethod
    def validation(self) -> dict[str, float]:
        """Validation figures, the same on every rank, each called `validation_...`; empty if there is no such data."""

    def backends(self) -> list[str]:
        """One line an operation: which implementation it takes here, and why."""
        return [f"optimizer: {self.engine.optimizer_name}"]

    def assets(self) -> dict[str, Asset]:
        """Files that a checkpoint needs beside the weights."""
        return {}

    def close(self) -> None:
        """End background work."""


def mean(total: float, count: float) -> float:
    """total / count, nan where nothing was counted."""
    # Not an error: no row of a step may have a target of some kind, or one with a weight. The metrics file writes null.
    return total / count if count else math.nan
