"""How much a checkpoint will take, and whether the disk has room, before the first step."""

from __future__ import annotations

import shutil
from pathlib import Path

from megatron_gemini.checkpoint.directory import complete_steps
from megatron_gemini.checkpoint.piece import MOMENTS
from megatron_gemini.checkpoint.save import saved_parts
from megatron_gemini.engine.engine import Engine
from megatron_gemini.engine.zero import ZeroEngine


def checkpoint_bytes(engine: Engine) -> int:
    """Of the weights and moments of all ranks; every rank calls it."""
    own = 0
    for _, part in saved_parts(engine):
        each = 4 * (1 + len(MOMENTS)) if isinstance(part, ZeroEngine) else part.dtype.itemsize
        own += each * sum(fragment.count for fragment in part.owned())
    return int(engine.total([float(own)])[0])


def forecast(engine: Engine, run: Path, keep: int) -> list[str]:
    """Lines to tell at a run's start; every rank calls it. keep: checkpoints that stay beside one that is written."""
    size = checkpoint_bytes(engine)
    there = min(len(complete_steps(run)), keep) if engine.topology.rank == 0 else 0
    free, wanted = shutil.disk_usage(_existing(run)).free, (keep + 1 - there) * size
    said = f"a checkpoint takes {size / 1e9:.3g} GB, and {run} has {free / 1e9:.3g} GB free"
    if free >= wanted:
        return []
    return [f"warning: {said}; train.keep {keep} needs room for {keep + 1 - there} more: lower it, or make room"]


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path
