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


def remove_stale_locks() -> list[Path]:
    """Remove locks that no process holds; returns them.

    A holder has its lock open, which /proc shows for the processes of this machine. So nothing is removed in a job of
    several nodes, which may share the folder, nor where there is no /proc.
    """
    world = os.environ.get("WORLD_SIZE", "1")
    here = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or world  # torchrun's, DeepSpeed's
    if here != world or not Path("/proc/self").exists():
        return []
    from torch.utils.cpp_extension import get_default_build_root

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    stale = _not_held([*root.glob("*/lock"), *root.glob("*/*/lock")])
    if stale:
        time.sleep(1.0)  # who is just letting go has closed its lock before it removes it
        stale = _not_held(stale)
    for lock in stale:
        lock.unlink(missing_ok=True)
    return stale


def _not_held(locks: Iterable[Path]) -> list[Path]:
    waiting = {os.path.realpath(lock): lock for lock in locks if lock.exists()}
    if not waiting:
        return []
    for entry in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):  # closed meanwhile, or another user's
            waiting.pop(os.readlink(entry), None)
    return list(waiting.values())
