"""Processes that a test has started, directly or not, and their ends."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import psutil

HANGS_AFTER = 180.0
"""Seconds that no step of a test takes, not even on a busy machine: they only end what would hang."""


def alive(process: psutil.Process) -> bool:
    """Neither gone nor a zombie, which its new parent may leave for some time."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def alive_at_last(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    """Those of `processes` that do not end."""
    left = list(processes)
    wait_until(lambda: not any(map(alive, left)))
    return [process for process in left if alive(process)]


def wait_until(condition: Callable[[], bool]) -> bool:
    """Whether it holds at last."""
    end = time.monotonic() + HANGS_AFTER
    while not (holds := condition()) and time.monotonic() < end:
        time.sleep(0.02)
    return holds
