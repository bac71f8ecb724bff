"""What a command costs, on a machine that may be busy with something else."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def children_use_less_than(seconds: float) -> Iterator[None]:
    """Fail if the processes that end inside use more CPU time; what they wait for a busy core does not count."""
    before = os.times()
    yield
    after = os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    assert used < seconds, f"{used:.2f} s of CPU time"
