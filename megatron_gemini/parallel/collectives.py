"""Activations between the stream of the decoder's layers and products that every tensor-parallel rank has a part of.

Shape suffixes: C tokens of the (context-local) row, S tokens of it that this rank's stream holds, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from megatron_gemini.kernels.autograd import Gradients, NodeContext
from megatron_gemini.parallel.topology import Topology

# torch 2.13 renamed both and warns about the old names.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Work(Protocol):
    """A collective under way, as torch.distributed returns it."""

    def wait(self) -> bool | None: ...


def all_gather(whole: torch.Tensor, mine: torch.Tensor, group: ProcessGroup) -> Work:
    """Begin to gather every rank's `mine` into `whole`, rank after rank along the first dimension; returns the work."""
    # torch's collectives read memory in the order in which it lies, so a strided tensor has to become a plain one.
    return _all_gather(whole, mine.contiguous(), group=group, async_op=True)


def reduce_scatter(mine: torch.Tensor, whole: torch.Tensor, group: ProcessGroup) -> Work:
    """Begin to sum `whole` over the ranks, of which this rank gets its part in `mine`; returns the work.

    gloo has it in every floating-point type, by an all-reduce inside.
    """
    return _reduce_scatter(mine, whole.contiguous(), group=group, async_op=True)


def all_reduce(x: torch.Tensor, group: ProcessGroup) -> Work:
    """Begin to sum x, which is contiguous, over the ranks, in place and with the same bits on all; returns the work."""
    if group.size() == 2 and dist.get_backend(group) == "gloo":
        return _PairSum(x, group)
    work = dist.all_reduce(x, group=group, async_op=True)
    assert work is not None, "this process is not in the group"
    return work


class _PairSum:
    """An all-reduce of two ranks over gloo: each sends the whole tensor and adds the other's.

    As many bytes as gloo's own all-reduce in half as many messages. `python tools/bench/parallel.py --only sum`: 0.87
    of its CPU time for 2 MiB by medians, 0.75 by minima (docs/performance.md).
    """

    def __init__(self, x: torch.Tensor, group: ProcessGroup) -> None:
        self.x, self.other = x, torch.empty_like(x)
        peer = dist.get_global_rank(group, 1 - group.rank())
        # Both only begin, so that two ranks which send first do not wait for each other to receive.
        self.work = [dist.isend(x, peer, group=group), dist.irecv(self.other, peer, group=group)]

    def wait(self) -> None:
        for work in self.work:
            assert work is not None, "this process is not in the group"
            work.wait()
        # a + b and b + a are the same bits, so the two ranks' copies never drift apart.
        self.x.add_(self.other)


# Slots, and not frozen: 0.2 instead of 0.45 us for each of the eight that a layer makes in a step, on one rank too.
@dataclass(slots=True)
class Pending:
    """A tensor that is whole once its collective has ended. work: None where there is no collective."""

    tensor: torch.Tensor
    work: Work | None = None

    def wait(self) -> torch.Tensor:
        if self.work is not None:
            self.work.wait()
        return self.tensor


@dataclass(frozen=True)
class TensorRanks:
    """The tensor-parallel ranks that divide the layers, and what passes between the stream and their products.

    One rank, the default, gathers and reduces nothing: both return the tensor that they are given. Of several without
    sequence parallelism, every rank's stream has every token (S = C): `gather` has nothing to do and `reduce` is an
    all-reduce. With it rank r has the r-th of `size` equal runs of tokens: they are an all-gather and a reduce-scatter
    (Korthikanti et al., 2022). Each is the gradient of the other, so a layer is written once for all three.
    Both begin the collective and return at once.
    """

    size: int = 1
    rank: int = 0
    sequence: bool = False
    group: ProcessGroup | None = None

    @staticmethod
    def of(topology: Topology) -> TensorRanks:
        """Those of a topology, which has a group wherever there are several."""
        if topology.tensor_size == 1:
            return TensorRanks()  # also where torch.distributed has made a group of this rank alone
        assert topology.tensor_group is not None
        return TensorRanks(topology.tensor_size, topology.tensor_rank, topology.sequence, topology.tensor_group)

    def gather(self, x_SD: torch.Tensor) -> Pending:
        """The stream's rows of all ranks: [C, D], the same on every rank."""
        if not self.sequence:
            return Pending(x_SD)
        assert self.group is not None
        whole_CD = x_SD.new_empty(len(x_SD) * self.size, *x_SD.shape[1:])
        return Pending(whole_CD, all_gather(whole_CD, x_SD, self.group))

    def reduce(self, x_CD: torch.Tensor) -> Pending:
        """This rank's stream of the sum of every rank's x_CD, [S, D]; overwrites x_CD without sequence parallelism."""
        if self.size == 1:
            return Pending(x_CD)
        assert self.group is not None
        if not self.sequence:
            x_CD = x_CD.contiguous()
            return Pending(x_CD, all_reduce(x_CD, self.group))
        sum_SD = x_CD.new_empty(len(x_CD) // self.size, *x_CD.shape[1:])
        return Pending(sum_SD, reduce_scatter(sum_SD, x_CD, self.group))


def gather_stream(x_SD: torch.Tensor, ranks: TensorRanks) -> torch.Tensor:
    """Differentiable `TensorRanks.gather`: [C, D]. The gradient is a partial one on each rank, and reduced here."""
    # One rank makes no node: on small rows a step is mostly dispatch.
    return _GatherStream.apply(x_SD, ranks) if ranks.size > 1 else x_SD


class _GatherContext(NodeContext):
    ranks: TensorRanks


class _GatherStream(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _GatherContext, x: torch.Tensor, ranks: TensorRanks) -> torch.Tensor:
        ctx.ranks = ranks
        return ranks.gather(x).wait()

    @staticmethod
    def backward(ctx: _GatherContext, *grads: torch.Tensor) -> Gradients:
        # An all-reduce overwrites what it sums, and autograd may hand the same gradient to another node as well.
        grad = grads[0] if ctx.ranks.sequence else grads[0].clone()
        return ctx.ranks.reduce(grad).wait(), None
