"""The most memory that a run has held."""

from __future__ import annotations

import re
from pathlib import Path


def peak_memory_bytes() -> int:
    """The most memory that this process has held: of its GPU where it uses one, otherwise resident in RAM."""
    import torch

    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    return _peak_resident_bytes()


def _peak_resident_bytes() -> int:
    # getrusage's figure would begin at the peak of the launcher that started this process; the kernel's own does not.
    status = Path("/proc/self/status")
    if status.exists():
        return int(re.search(r"VmHWM:\s*(\d+) kB", status.read_text())[1]) * 1024  # type: ignore[index]
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
