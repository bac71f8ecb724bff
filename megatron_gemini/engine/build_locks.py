"""Locks of compiled operators that a process left behind when it was killed.

torch puts a lock file beside an operator while it is built or loaded, which every rank does at each start. Killed at
that moment, a process leaves it for ever, and every later run waits for it without a word.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable
from pathlib import Path

from megatron_gemini.engine.builds import build_folder


def remove_stale_locks() -> list[Path]:
    """Remove locks that no process holds; returns them.

    A holder has its lock open, which /proc shows for the processes of this machine. So nothing is removed in a job of
    several nodes, which may share the folder, nor where there is no /proc.
    """
    if not _one_machine() or not Path("/proc/self").exists():
        return []
    stale = _not_held(build_folder().glob("*/lock"))
    if stale:
        time.sleep(1.0)  # who is just letting go has closed its lock before it removes it
        stale = _not_held(stale)
    for lock in stale:
        lock.unlink(missing_ok=True)
    return stale


def _one_machine() -> bool:
    """Whether all ranks are known to run on this machine; without a word of it from a launcher they are not."""
    world = os.environ.get("WORLD_SIZE", "1")
    here = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE")  # torchrun's, DeepSpeed's
    if here:
        return here == world
    # srun exports neither. Nodes first of the step, which may be fewer than the job's.
    nodes = os.environ.get("SLURM_STEP_NUM_NODES") or os.environ.get("SLURM_NNODES")
    return nodes == "1" if nodes else world == "1"


def _not_held(locks: Iterable[Path]) -> list[Path]:
    waiting = {os.path.realpath(lock): lock for lock in locks if lock.exists()}
    if not waiting:
        return []
    for entry in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):  # closed meanwhile, or another user's
            waiting.pop(os.readlink(entry), None)
    return list(waiting.values())
