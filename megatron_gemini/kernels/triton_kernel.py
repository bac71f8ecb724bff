"""What the launches of attention's and the loss's Triton kernels share. Imports no Triton, which CPUs need not have."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Protocol

import torch


class Kernel(Protocol):
    """A function under triton.jit: kernel[grid](...) launches it."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]: ...


def on_device(device: torch.device) -> torch.cuda.device | nullcontext[None]:
    """Triton launches on the current card, which need not be the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
