"""Which implementation of the loss's work on a chunk runs.

torch    everywhere. It keeps the exponentials of the first half for the second, so that each is taken once.
triton   on CUDA: each half is one kernel that reads a logit once and computes in float32, whatever the logits are.
         torch takes five passes there and, for bfloat16, a float32 copy. `tools/bench/loss.py` compares them.
"""

from __future__ import annotations

import functools
import importlib.util

import torch

from megatron_gemini.kernels.losses.softmax_chunk import TORCH, LossBackend


@functools.cache
def _triton() -> LossBackend:
    from megatron_gemini.kernels.losses.softmax_chunk_triton import TRITON  # imports Triton, which CPUs need not have

    return TRITON


def loss_backend(device: torch.device) -> tuple[str, str]:
    """(the backend that the loss takes on `device`, why), for the run's first log lines."""
    if device.type != "cuda":
        return "torch", f"in place, chunk by chunk, on {device.type}"
    if importlib.util.find_spec("triton") is None:
        return "torch", "in place, chunk by chunk; Triton is not installed"
    return "triton", "one kernel for a chunk's statistics, one for its gradient"


@functools.cache
def choose_backend(device: torch.device, dtype: torch.dtype, forced: str | None = None) -> LossBackend:
    """That of `loss_backend`, or `forced`; float64, which is there for tests, is torch's.

    Raises ValueError for a name that is not a backend's.
    """
    name = forced or ("torch" if dtype == torch.float64 else loss_backend(device)[0])
    if name not in ("torch", "triton"):
        raise ValueError(f"the loss has no backend {name!r}; take 'torch' or 'triton'")
    return TORCH if name == "torch" else _triton()
