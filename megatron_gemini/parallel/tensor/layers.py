"""The decoder's layers of one topology: one set of modules and autograd nodes for any number of tensor-parallel ranks.

A model asks `LayerFactory` for a layer and never learns how many ranks divide it. Everything here is ours; what comes
from megatron-core is the process groups (`parallel/topology.py`), so one rank imports nothing of it.
"""

from __future__ import annotations

import torch

from megatron_gemini.parallel.collectives import TensorRanks, gather_stream
from megatron_gemini.parallel.context.positions import context_positions, stream_positions
from megatron_gemini.parallel.context.ranks import ContextRanks
from megatron_gemini.parallel.parameters import normal
from megatron_gemini.parallel.tensor.modules import MLP, AttentionInput, AttentionOutput, RMSNorm
from megatron_gemini.parallel.tensor.vocabulary import Vocabulary
from megatron_gemini.parallel.topology import Topology


class LayerFactory:
    """Makes the layers of one topology. Widths are global; `std` is that of the normal initial weights."""

    def __init__(self, topology: Topology) -> None:
        self.topology = topology
        self.ranks = TensorRanks.of(topology)

    def attention_input(
        self, width: int, query_heads: int, key_heads: int, head_width: int, *, eps: float, std: float
    ) -> AttentionInput:
        """Its output is this rank's query heads and the key/value heads that they read."""
        return AttentionInput(self.ranks, width, query_heads, key_heads, head_width, eps, std)

    def attention_output(self, width_in: int, width: int, *, std: float) -> AttentionOutput:
        """Of this rank's heads; the output is the stream."""
        return AttentionOutput(self.ranks, width_in, width, std)

    def mlp(self, width: int, mlp_width: int, activation: str, *, eps: float, std: float, last_std: float) -> MLP:
        """Divided over its inner width; last_std is that of `down`, which ends the branch."""
        return MLP(self.ranks, width, mlp_width, activation, eps, std, last_std)

    def embedding(self, size: int, width: int, *, std: float) -> Vocabulary:
        """`size` rows, divided over the ranks and padded to a multiple of them."""
        return Vocabulary(self.ranks, size, width, init=normal(std))

    def norm(self, width: int, eps: float) -> RMSNorm:
        """RMSNorm of the stream, of which a rank has only its own tokens under sequence parallelism."""
        return RMSNorm(width, eps, partial=self.ranks.sequence)

    def head_norm(self, width: int, eps: float) -> RMSNorm:
        """RMSNorm of every head of queries or keys: ranks have different queries, and their keys serve only those."""
        return RMSNorm(width, eps, partial=self.ranks.size > 1)

    def stream(self, tokens: int, device: torch.device | str = "cpu") -> torch.Tensor:
        """int64[S], ascending: the positions of a row of `tokens` that this rank's stream holds between the layers."""
        return stream_positions(tokens, self.topology, device)

    def gather_stream(self, h_SD: torch.Tensor) -> torch.Tensor:
        """The stream of all tensor-parallel ranks, before the head: [C, D].

        Under sequence parallelism its gradient is summed over the ranks here; the head leaves it a partial gradient.
        Otherwise the head sums it: over its weighted tokens only, while the gradient of its weight is computed.
        """
        return gather_stream(h_SD, self.ranks) if self.ranks.sequence else h_SD

    def context(self) -> ContextRanks:
        """What brings the row's keys and values together where context-parallel ranks divide its tokens."""
        return ContextRanks(self.topology)

    def context_positions(self, tokens: int, device: torch.device | str = "cpu") -> torch.Tensor | None:
        """int64[C], ascending: the positions of a row of `tokens` that this context rank has; None if all."""
        return context_positions(tokens, self.topology, device) if self.topology.context_size > 1 else None
