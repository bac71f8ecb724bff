"""Which tokens of a row a rank works on, where context and sequence parallelism divide it.

Shape suffixes: T tokens of the row, C tokens of this context rank, S tokens of its activations between two layers.
"""

from __future__ import annotations

import torch

from megatron_gemini.parallel.topology import Topology


def context_positions(tokens: int, topology: Topology, device: torch.device | str = "cpu") -> torch.Tensor:
    """int64[C], ascending: the positions of a row of `tokens` whose queries this context rank computes.

    Rank c of n has the chunks c and 2n - 1 - c of 2n, so that all have the same causal attention to do. Every token if
    there is one context rank. Raises ValueError if the row does not divide.
    """
    ranks, rank = topology.context_size, topology.context_rank
    if ranks == 1:
        return torch.arange(tokens, device=device)
    if tokens % (2 * ranks):
        raise ValueError(
            f"a row of {tokens} tokens does not divide into 2 x {ranks} chunks for parallel.context {ranks}"
        )
    # A chunk from the front and its mirror image from the back: what a causal query of one attends to more, one of the
    # other attends to less.
    chunks = torch.arange(tokens, device=device).view(2 * ranks, -1)
    return torch.cat((chunks[rank], chunks[2 * ranks - 1 - rank]))


def stream_positions(tokens: int, topology: Topology, device: torch.device | str = "cpu") -> torch.Tensor:
    """int64[S], ascending: the positions of a row of `tokens` that this rank's activations between layers hold.

    Those of its context rank, or with sequence parallelism the share of its tensor-parallel rank of them, in order.
    Raises ValueError if they do not divide.
    """
    positions = context_positions(tokens, topology, device)
    if not topology.sequence or topology.tensor_size == 1:
        return positions
    if len(positions) % topology.tensor_size:
        raise ValueError(
            f"{len(positions)} tokens of a row do not divide over {topology.tensor_size} tensor-parallel ranks, as "
            "parallel.sequence wants; choose another data.row_tokens"
        )
    # Equal runs in order: a reduce-scatter gives rank r the r-th of equal pieces, and an all-gather undoes that.
    return positions.view(topology.tensor_size, -1)[topology.tensor_rank]
