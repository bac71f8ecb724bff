"""Entry point of training: `megatron-gemini train`, `python -m` and `deepspeed --module megatron_gemini.train`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from megatron_gemini.cli import end, run_command
from megatron_gemini.config.layout import check_layout
from megatron_gemini.config.load import load_config
from megatron_gemini.models.presets import preset
from megatron_gemini.registry import OBJECTIVES
from megatron_gemini.training.schedule import check_schedule


def main(argv: list[str]) -> int:
    """Read the settings, check what can be checked without torch, and train. Returns the exit status."""
    config = load_config(argv, presets=preset)
    check_schedule(config.schedule, config.train.steps)
    check_layout(config, int(os.environ.get("WORLD_SIZE", "1")))

    # Imported here so that --help and a mistyped option answer at once; quiet before DeepSpeed is imported.
    from megatron_gemini.training.quiet import quiet_warnings

    quiet_warnings()

    from megatron_gemini.engine.builds import builds_watched
    from megatron_gemini.training.job import join_job
    from megatron_gemini.training.loop import Loop
    from megatron_gemini.training.run_lock import locked
    from megatron_gemini.training.stop import StoppedError

    # The signal is raised behind `join_job`, which leaves the process group only where nothing was raised.
    with join_job(config) as (topology, device), locked(Path(config.train.output_dir), topology, device) as lock:
        # The lock first: reading the data already writes indices into the run's folder.
        with builds_watched(topology.rank):
            objective = OBJECTIVES.get(config.objective.kind).build(config, topology, device)
        number = Loop(objective, lock).run()
    if number:
        raise StoppedError(number)
    return 0


if __name__ == "__main__":
    end(run_command(main, sys.argv[1:]))
