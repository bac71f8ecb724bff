"""Context parallelism: a row's tokens divided over ranks, each of which computes its queries against all keys.

Only keys and values travel. With one key/value head they are small: 2 H values a token, against N H for the queries.
Every rank gathers them whole, before RoPE, and attention needs no second step. Llama 3 does so for grouped queries
(Grattafiori et al., 2024, section 3.3.2). The alternatives fit this model worse (docs/design.md has the bytes):

- An all-to-all from tokens to heads (Ulysses; Jacobs et al., 2023) has one key/value head to give to all ranks. It
  would have to be gathered anyway, and queries and outputs would travel besides.
- A ring (Liu et al., 2023) moves the same bytes in steps that each wait for a partial attention to be merged. In the
  backward it moves half as many again.

Shape suffixes: T tokens of the row, C tokens of this context rank, K key/value heads, H head width.
"""

from __future__ import annotations

import torch
from torch.distributed import ProcessGroup

from megatron_gemini.kernels.autograd import Gradients, NodeContext
from megatron_gemini.parallel.collectives import all_gather, reduce_scatter
from megatron_gemini.parallel.topology import Topology


class ContextRanks:
    """Brings the keys and values of all context ranks together, in the order of the row. One rank gathers nothing."""

    def __init__(self, topology: Topology) -> None:
        self.size, self.group = topology.context_size, topology.context_group

    def gather(self, k_CKH: torch.Tensor, v_CKH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """k_TKH and v_TKH of the row whose tokens `context_positions` assigns to the ranks; all ranks call it.

        Their gradients are summed over the ranks, in the type of k and v, and each rank gets those of its own tokens.
        """
        if self.size == 1:
            return k_CKH, v_CKH
        assert self.group is not None
        return _Gather.apply(k_CKH, v_CKH, self.size, self.group)


class _GatherTokensContext(NodeContext):
    size: int
    group: ProcessGroup


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _GatherTokensContext, k: torch.Tensor, v: torch.Tensor, size: int, group: ProcessGroup
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.size, ctx.group = size, group
        both_C2KH = torch.stack((k, v), 1)  # one collective for both, since each is small
        by_rank = both_C2KH.new_empty(len(k) * size, *both_C2KH.shape[1:])
        all_gather(by_rank, both_C2KH, group=group).wait()
        k_TKH, v_TKH = (row_order(x, size) for x in by_rank.unbind(1))
        return k_TKH, v_TKH  # each its own memory: what holds the values does not keep keys before RoPE alive

    @staticmethod
    def backward(ctx: _GatherTokensContext, *grads: torch.Tensor) -> Gradients:
        # The chunks of each rank side by side, since a reduce-scatter gives rank r the r-th of equal pieces.
        by_rank = torch.stack([rank_order(grad, ctx.size) for grad in grads], 1)
        own = by_rank.new_empty(len(by_rank) // ctx.size, *by_rank.shape[1:])
        reduce_scatter(own, by_rank, group=ctx.group).wait()
        k_grad, v_grad = own.unbind(1)
        return k_grad, v_grad, None, None


def row_order(x: torch.Tensor, ranks: int) -> torch.Tensor:
    """[T, ...], rank after rank as `context_positions` assigns the chunks -> in the order of the row."""
    # Rank c has the chunks c and 2n - 1 - c: first halves in the order of the ranks, then second halves against it.
    first, second = x.view(ranks, 2, -1, *x.shape[1:]).unbind(1)
    return torch.cat((first, second.flip(0))).flatten(0, 1)


def rank_order(x: torch.Tensor, ranks: int) -> torch.Tensor:
    """The inverse of `row_order`."""
    chunks = x.view(2 * ranks, -1, *x.shape[1:])
    return torch.stack((chunks[:ranks], chunks[ranks:].flip(0)), 1).flatten(0, 2)
