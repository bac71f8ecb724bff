"""One global gradient norm over all ranks and engines, in place of DeepSpeed's.

DeepSpeed guesses from rank numbers which copy of a parameter counts, and is wrong under model parallelism. Here every
parameter has declared its placement: a shard counts wherever it lies, a replicated parameter on the first
tensor-parallel rank only, a tied one on the stage of the original.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.distributed as dist

from megatron_gemini.engine.internals.fragments import Fragment


@torch.no_grad()
def global_norm(owned: Sequence[Fragment], device: torch.device) -> torch.Tensor:
    """float32[]: the 2-norm of the whole model's gradient; inf or nan where any element is not finite.

    owned: the pieces that this rank answers for, over all its engines.
    """
    # In float64: where ZeRO cuts a parameter, and how many ranks add up, must not show in the first seven digits.
    total = torch.zeros((), dtype=torch.float64, device=device)
    # Group by group: of those on a disk only one is in memory, and the views of the one before are void.
    for _, pieces in itertools.groupby(owned, key=lambda fragment: fragment.group):
        gradients = [gradient.float() for piece in pieces if (gradient := piece.gradient()) is not None]
        if gradients:
            norms = torch._foreach_norm(gradients)  # one kernel for many small tensors
            total += torch.stack([norm.to(device) for norm in norms]).double().square().sum()
    if dist.is_initialized():
        dist.all_reduce(total)
    return total.sqrt().float()


@torch.no_grad()
def clip_gradients(pieces: Sequence[Fragment], norm: torch.Tensor, bound: float) -> None:
    """Scale every gradient so that the global norm is at most `bound`; 0 does not clip."""
    if bound <= 0 or norm <= bound:
        return
    for fragment in pieces:
        gradient = fragment.gradient()
        if gradient is not None:
            # As torch's clip_grad_norm_ has it.
            gradient.mul_((bound / (norm + 1e-6)).to(gradient.device))
