"""Gradients that no rank has whole, completed once a step, after DeepSpeed has reduced and divided them.

Two kinds of weights lie whole on several ranks that each see part of what they do:

- replicated ones of which every tensor-parallel rank computed the gradient of its tokens or heads
  (`Placement.partial`);
- an embedding that the first and the last pipeline stage both hold (`Placement.tied`).

Ranks that share such a weight have the same layout of it. So their ZeRO partitions are cut at the same places and can
be added as they are. That costs one small all-reduce a step, of the weights divided by the data-parallel ranks. Summing
in the backward would cost one a layer and microbatch.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from megatron_gemini.engine.internals.fragments import Fragment
from megatron_gemini.engine.zero import ZeroEngine
from megatron_gemini.parallel.parameters import placement_of
from megatron_gemini.parallel.topology import Topology


@torch.no_grad()
def complete_gradients(part: ZeroEngine, topology: Topology, device: torch.device) -> None:
    """Sum a stage's partial gradients over the tensor-parallel ranks, and tied ones over their two stages, in place.

    Summed in float32.
    """
    if topology.tensor_size > 1:
        _add_up(part, [p for p in part.fragments if placement_of(p.parameter).partial], topology.tensor_group, device)
    if topology.tied_group is not None:
        _add_up(part, [p for p in part.fragments if placement_of(p.parameter).tied], topology.tied_group, device)


def _add_up(part: ZeroEngine, pieces: Sequence[Fragment], group: ProcessGroup | None, device: torch.device) -> None:
    for number, of_group in itertools.groupby(pieces, key=lambda piece: piece.group):
        found = [(piece, gradient) for piece in of_group if (gradient := piece.gradient()) is not None]
        if not found:
            continue
        # Under ZeRO-3 zeros stand behind the last elements, as many as make all partitions as long.
        parts = [gradient.narrow(0, 0, piece.count) for piece, gradient in found]
        # One collective for all of a group: there are dozens of small norms and biases.
        flat = torch.cat([part.to(device, torch.float32) for part in parts])
        dist.all_reduce(flat, group=group)
        for mine, total in zip(parts, flat.split([len(part) for part in parts]), strict=True):
            mine.copy_(total)
        part.wrapper.bring_in(number, gradients=True)
