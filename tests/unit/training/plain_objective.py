"""An objective of one process whose steps do what a test has written down, with real checkpoints."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_gemini.config.engine import EngineConfig
from megatron_gemini.config.run import RunConfig
from megatron_gemini.config.schema import Plain
from megatron_gemini.config.training import LoggingConfig, ScheduleConfig, TrainConfig
from megatron_gemini.engine.engine import Engine, StepResult
from megatron_gemini.engine.synchronize import StepFingerprint
from megatron_gemini.objectives.base import Objective
from megatron_gemini.parallel.topology import Topology


@dataclass(frozen=True)
class Planned:
    """A step. norm: of its gradient. weight: sum of its loss weights. before: what happens when it is read."""

    norm: float = 1.0
    weight: float = 1.0
    before: Callable[[], None] | None = None


class PlainEngine(Engine[Planned, Planned]):
    """Has no module; `updates` counts the steps that changed one if there were one."""

    optimizer_name = "none"

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config, Topology.serial(), torch.device("cpu"))
        self.norm, self.updates = 0.0, 0

    def forward_backward(self, step: Planned, weight: float, collect: Callable[[Planned], None]) -> None:
        assert weight > 0
        self.norm = step.norm
        collect(step)

    def evaluate(self, step: Planned, collect: Callable[[Planned], None]) -> None:
        raise AssertionError("nothing is evaluated")

    def step(self, lr: float) -> StepResult:
        skipped = not torch.isfinite(torch.tensor(self.norm)).item()
        self.updates += not skipped
        return StepResult(self.norm, skipped)


class PlainObjective(Objective[Planned, Planned]):
    """Takes its steps from a list, and its place in that is the state of its data."""

    engine: PlainEngine

    def __init__(self, config: RunConfig, steps: Sequence[Planned]) -> None:
        super().__init__(config, Topology.serial(), torch.device("cpu"))
        self.engine, self.steps, self.place = PlainEngine(config), steps, 0

    def read(self) -> tuple[Planned, str]:
        step = self.steps[self.place]
        self.place += 1
        if step.before:
            step.before()
        return step, ""

    def weight(self, step: Planned) -> float:
        return step.weight

    def fingerprint(self, number: int, step: Planned) -> StepFingerprint:
        return StepFingerprint(number, 1)

    def sums(self, outputs: Sequence[Planned], step: Planned) -> dict[str, float]:
        return {"loss": sum(output.norm for output in outputs), "tokens": 1.0}

    def record(self, sums: Mapping[str, float]) -> dict[str, float]:
        return dict(sums)

    def data_state(self) -> dict[str, Plain]:
        return {"0": {"place": self.place}}

    def load_data_state(self, state: Mapping[str, Plain]) -> None:
        lane = state["0"]
        assert isinstance(lane, dict) and isinstance(lane["place"], int)
        self.place = lane["place"]

    def skipped(self) -> Counter[tuple[str, str]]:
        return Counter()

    def validation(self) -> dict[str, float]:
        return {}


def objective(run: Path, steps: Sequence[Planned], **train: Plain) -> PlainObjective:
    """On a run directory, for as many steps as are given. train: settings of that section."""
    settings = dataclasses.replace(TrainConfig(output_dir=str(run), steps=len(steps)), **train)
    config = RunConfig(
        train=settings,
        engine=EngineConfig(zero_stage=0, offload_optimizer="none"),
        schedule=ScheduleConfig(warmup_steps=0),
        logging=LoggingConfig(tensorboard=False),
    )
    return PlainObjective(config, steps)
