"""Activations between the stream of the decoder's layers and products that every tensor-parallel rank has a part of.

Shape suffixes: C tokens of the (context-local) row, S tokens of it that this rank's stream holds, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from megatron_gemini.parallel.topology import Topology

# torch 2.13 renamed both and warns about the old names.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def all_gather(whole: torch.Tensor, mine: torch.Tensor, group: ProcessGroup) -> Any:
    """Begin to gather every rank's `mine` into `whole`, rank after rank along the first dimension; returns the work."""
    return _all_gather(whole, mine.contiguous(), group=group, async_op=True)


def reduce_scatter(mine: torch.Tensor, whole: torch.Tensor, group: ProcessGroup) -> Any:
    """Begin to sum `whole` over the ranks, of which this rank gets its part in `mine`; returns the work.

    gloo has it in every floating-point type, by an all-reduce inside.
    """
    return _reduce_scatter(mine, whole.contiguous(), group=group, async_op=True)


def all_reduce(x: torch.Tensor, group: ProcessGroup) -> Any:
    """Begin to sum x, which is contiguous, over the ranks, in place and with the same bits on all; returns the work."""
    if group.size() == 2 and dist.get_backend(group) == "gloo":
        return _PairSum(x, group)
    return dist.all_reduce(x, group=group, async_op=True)


class _PairSum:
    """An all-reduce of two ranks over gloo: each sends the whole tensor and adds the other's.

    As many bytes as gloo's own all-reduce in half as many messages. `python tools/bench/parallel.py --only sum`: 0.87
    of its CPU time for 2 MiB by medians, 0.75 by minima (docs/performance.md).
    """

    def __init__(self, x: torch.Tensor, group: ProcessGroup) -> None:
        self.x, self.other = x, torch.empty_like(x)
        peer = dist.get_global_rank(group, 1 - group.rank())
        self.work: list[Any] = [dist.isend(x, peer, group=group), dist.irecv(self.other, peer, group=group)]

    def wait(self) -> None:
        for work in self.work:
            work.wait()
        self.x.add_(self.other)


@dataclass(frozen=True)
class Pending:
    """A tensor that is whole once its collective has ended."""

    tensor: torch.Tensor
    work: Any = None

    def wait(self) -> torch.Tensor:
        if self.work is not None:
            self.work.wait()
        return self.tensor


@dataclass(frozen=True)
class TensorRanks:
    """The tensor-parallel ranks of `group`, and what passes between the stream and their products.

    Without sequence parallelism every rank's stream has every token (S = C): `gather` has nothing to do and `reduce` is
    an all-reduce. With it rank r has the r-th of `size` equal runs of tokens: they are an all-gather and a
    reduce-scatter (Korthikanti et al., 2022). Each is the gradient of the other, so a layer is written once.
    Both begin the collective and return at once.
    """

    group: ProcessGroup
    size: int
    sequence: bool

    @staticmethod
    def of(topology: Topology) -> TensorRanks:
        """Of a topology whose tensor-parallel ranks divide something."""
        assert topology.tensor_group is not None and topology.tensor_size > 1
        return TensorRanks(topology.tensor_group, topology.tensor_size, topology.sequence)

    def gather(self, x_SD: torch.Tensor) -> Pending:
        """The stream's rows of all ranks: [C, D], the same on every rank."""
        if not self.sequence:
            return Pending(x_SD)
        whole_CD = x_SD.new_empty(len(x_SD) * self.size, *x_SD.shape[1:])
        return Pending(whole_CD, all_gather(whole_CD, x_SD, self.group))

    def reduce(self, x_CD: torch.Tensor) -> Pending:
        """This rank's stream of the sum of every rank's x_CD, [S, D]; overwrites x_CD without sequence parallelism."""
        if not self.sequence:
            x_CD = x_CD.contiguous()
            return Pending(x_CD, all_reduce(x_CD, self.group))
        sum_SD = x_CD.new_empty(len(x_CD) // self.size, *x_CD.shape[1:])
        return Pending(sum_SD, reduce_scatter(sum_SD, x_CD, self.group))


def gather_stream(x_SD: torch.Tensor, ranks: TensorRanks) -> torch.Tensor:
    """Differentiable `TensorRanks.gather`: [C, D], whose gradient on each rank is a partial gradient."""
    return _GatherStream.apply(x_SD, ranks)


class _GatherStream(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, ranks: TensorRanks) -> torch.Tensor:
        ctx.ranks = ranks
        return ranks.gather(x).wait()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return ctx.ranks.reduce(grads[0]).wait(), None
