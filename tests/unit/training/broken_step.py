"""Runs of the real training loop in one process, in each of which one step's gradients are not finite.

    python -m tests.unit.training.broken_step STEP run.yaml [run.yaml ...]

A process of its own, since DeepSpeed joins a process group once in a process.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable

import torch

from megatron_gemini.config.load import load_config
from megatron_gemini.contracts import StepRows
from megatron_gemini.models.presets import preset
from megatron_gemini.models.stage import LossOutput
from megatron_gemini.objectives.packed import PackedObjective
from megatron_gemini.parallel.topology import Topology
from megatron_gemini.registry import OBJECTIVES
from megatron_gemini.training.loop import Loop
from megatron_gemini.training.quiet import quiet_warnings
from tests.unit.engine.tiny_engines import alone_in_the_world


def run(path: str, broken: int) -> None:
    """`Loop` with the objective and the engine of the command; step number `broken` divides by NaN."""
    config = load_config(["--config", path], presets=preset)
    objective = OBJECTIVES.get(config.objective.kind).build(config, Topology.serial(), torch.device("cpu"))
    assert isinstance(objective, PackedObjective)
    forward_backward, begun = objective.engine.forward_backward, []

    def breaking(step: StepRows, weight: float, collect: Callable[[LossOutput], None]) -> None:
        forward_backward(step, math.nan if len(begun) == broken else weight, collect)
        begun.append(step)

    objective.engine.forward_backward = breaking  # type: ignore[method-assign]
    assert Loop(objective).run() == 0


if __name__ == "__main__":
    quiet_warnings()
    with alone_in_the_world():
        for config in sys.argv[2:]:
            run(config, int(sys.argv[1]))
