"""One global gradient norm over all ranks, in place of DeepSpeed's.

DeepSpeed guesses from rank numbers which copy of a parameter counts, and is wrong under model parallelism. Here
every parameter has declared its placement: a shard counts wherever it lies, a replicated parameter on the first
tensor-parallel rank only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from megatron_gemini.engine.fragments import Fragment
from megatron_gemini.parallel.parameters import placement_of
from megatron_gemini.parallel.topology import Topology


def counts_here(fragment: Fragment, topology: Topology, replicated_over_data: bool) -> bool:
    """Whether this rank's piece enters the norm. replicated_over_data: ZeRO-0, every data rank holds all."""
    if replicated_over_data and topology.data_rank != 0:
        return False
    return placement_of(fragment.parameter).sharded_dim is not None or topology.tensor_rank == 0


@torch.no_grad()
def global_norm(
    pieces: Sequence[Fragment], topology: Topology, replicated_over_data: bool, device: torch.device
) -> torch.Tensor:
    """float32[]: the 2-norm of the whole model's gradient; inf or nan where any element is not finite."""
    counted = [
        gradient
        for fragment in pieces
        if counts_here(fragment, topology, replicated_over_data) and (gradient := fragment.gradient()) is not None
    ]
    total = torch.zeros((), dtype=torch.float64, device=device)
    if counted:
        norms = torch._foreach_norm([gradient.float() for gradient in counted])
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
            gradient.mul_((bound / (norm + 1e-6)).to(gradient.device))
