"""Entry point of training: `megatron-gemini train`, `python -m` and `deepspeed --module megatron_gemini.train`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from megatron_gemini.cli import end, run_command
from megatron_gemini.config.layout import check_layout
from megatron_gemini.config.load import load_config
from megatron_gemini.config.mistakes import Mistakes
from megatron_gemini.config.run import RunConfig
from megatron_gemini.data.sources.paths import expand_shards, is_url
from megatron_gemini.models.presets import preset
from megatron_gemini.registry import OBJECTIVES
from megatron_gemini.training.schedule import check_schedule


def main(argv: list[str]) -> int:
    """Read the settings, check what can be checked without torch, and train. Returns the exit status."""
    config = load_config(argv, presets=preset)
    check(config, int(os.environ.get("WORLD_SIZE", "1")))

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


def check(config: RunConfig, world: int) -> None:
    """Raise `ValueError` that tells all that is wrong with a configuration on `world` ranks, without torch."""
    mistakes = Mistakes()
    with mistakes.collected():
        check_schedule(config.schedule, config.train.steps)
    with mistakes.collected():
        check_layout(config, world)
    rows = OBJECTIVES.get(config.objective.kind).rows is not None
    if rows and not Path(config.data.text_model).is_file():
        with mistakes.collected():
            raise ValueError(
                f"data.text_model is {config.data.text_model!r}, which does not exist; train a SentencePiece model on "
                "your texts with tools/train_sentencepiece.py, or name another file"
            )
    if not config.data.sources:
        with mistakes.collected():
            raise ValueError("data.sources is empty; name at least one set of shards")
    for source in (*config.data.sources, *config.data.validation):
        with mistakes.collected():
            if not is_url(source.shards):  # a store is asked once, by what reads from it
                expand_shards(source.shards)
    mistakes.tell()


if __name__ == "__main__":
    end(run_command(main, sys.argv[1:]))
