"""How much of the machine a run uses: peak memory, and model FLOPs utilization where the device's peak is known."""

from __future__ import annotations

import re
from pathlib import Path

from megatron_gemini.config.run import RunConfig
from megatron_gemini.models.flops import peak_flops


def utilization(config: RunConfig, flops_per_token: float, tokens_per_second: float, devices: int) -> float | None:
    """Model FLOPs utilization (MFU) in [0, 1]: the FLOP/s that the model needs over the dense bf16 peak of `devices`.

    None without CUDA, on a device that is not in the table, and in fp32, which has another peak.
    """
    import torch

    if config.engine.precision != "bf16" or not torch.cuda.is_available():
        return None
    peak = peak_flops(torch.cuda.get_device_name())
    return None if peak is None else flops_per_token * tokens_per_second / (peak * devices)


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
