"""Runs of the real training loop in one process, with two accidents each.

    python -m tests.unit.training.disturbed_runs BROKEN STOPPED run.yaml [run.yaml ...]

The gradients of step BROKEN are not finite. SIGTERM comes in step number STOPPED, and the run goes on from its
checkpoint. Steps count from 0 for the first, and from 1 for the second.

A process of its own, since DeepSpeed joins a process group once in a process.
"""

from __future__ import annotations

import math
import signal
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

Train = Callable[[StepRows, float, Callable[[LossOutput], None]], None]


def run(path: str, broken: int, interrupted: int) -> None:
    """`Loop` with the objective and the engine of the command, and once more from where it was stopped."""
    config = load_config(["--config", path], presets=preset)
    begun: list[StepRows] = []
    for expected in (signal.SIGTERM, 0):
        objective = OBJECTIVES.get(config.objective.kind).build(config, Topology.serial(), torch.device("cpu"))
        assert isinstance(objective, PackedObjective)
        forward_backward = objective.engine.forward_backward

        def disturbed(
            step: StepRows, weight: float, collect: Callable[[LossOutput], None], whole: Train = forward_backward
        ) -> None:
            whole(step, math.nan if len(begun) == broken else weight, collect)
            begun.append(step)
            if len(begun) == interrupted:
                signal.raise_signal(signal.SIGTERM)

        objective.engine.forward_backward = disturbed  # type: ignore[method-assign]
        assert Loop(objective).run() == expected


if __name__ == "__main__":
    quiet_warnings()
    with alone_in_the_world():
        for config in sys.argv[3:]:
            run(config, *map(int, sys.argv[1:3]))
