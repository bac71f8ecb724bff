"""The vocabulary's rows, divided over the tensor-parallel ranks: embedding, head, or both when tied.

Ours, as all of a layer is. Under sequence parallelism megatron-core's VocabParallelEmbedding wants [S, B, D] and a CUDA
device, and importing it takes seconds that one rank has no use for. What this package takes from megatron-core are its
process groups (`parallel/topology.py`).

Shape suffixes: T tokens, C tokens of this context rank, S tokens of this rank's stream, D model width, V vocabulary
rows of this rank, with padding.
"""

from __future__ import annotations

from typing import Protocol, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed import ProcessGroup

from megatron_gemini.kernels.autograd import Gradients, NodeContext
from megatron_gemini.kernels.linear import linear
from megatron_gemini.parallel.collectives import TensorRanks, gather_stream
from megatron_gemini.parallel.parameters import Init, new_sharded_parameter, placement_of

Result_co = TypeVar("Result_co", covariant=True)
Result = TypeVar("Result")


class FusedHead(Protocol[Result_co]):
    """An operation of hidden states [T, D] and a vocabulary's weight [V, D], such as `linear_cross_entropy`.

    Its other arguments are bound. first, size, group: the weight's rows are those of the ids from `first` on, of a
    vocabulary of `size` ids that the ranks of `group` divide. reduce_input_gradient: the hidden states' gradient is
    summed over them here; otherwise `gather_stream`, which gathered the hidden states, sums and divides it in one.
    """

    def __call__(
        self,
        h_TD: torch.Tensor,
        weight_VD: torch.Tensor,
        /,
        *,
        first: int,
        size: int,
        group: ProcessGroup | None,
        reduce_input_gradient: bool,
    ) -> Result_co: ...


class Vocabulary(nn.Module):
    """One row a token id: an embedding, a head, or both when tied. weight: [V, D], from id `first` on.

    The rows are padded to a multiple of the ranks; the padding is zero, masked from the softmax and in no checkpoint.
    All uses go through forward so that ZeRO-3's hooks gather the weight whichever it is.
    """

    def __init__(self, ranks: TensorRanks, size: int, width: int, *, init: Init) -> None:
        super().__init__()
        self.weight = new_sharded_parameter(ranks, 0, size, width, init=init)
        self.first = placement_of(self.weight).start
        self.size = size
        self.ranks = ranks

    def forward(
        self, x: torch.Tensor, as_head: bool = False, fused: FusedHead[Result] | None = None
    ) -> torch.Tensor | Result:
        """int64 ids [C] -> this rank's stream of their embeddings [S, D]. Several ranks' ids are those of the same row.

        as_head: hidden states [..., D] -> logits [..., V]. fused: hidden states [T, D] -> what it makes of them.
        """
        # Under sequence parallelism the gradient of the head's input is left partial: `gather_stream` sums it.
        reduce = not self.ranks.sequence
        if fused is not None:
            group = self.ranks.group
            return fused(x, self.weight, first=self.first, size=self.size, group=group, reduce_input_gradient=reduce)
        if as_head:
            return linear(gather_stream(x, self.ranks) if reduce else x, self.weight)
        return embed_stream(x, self.weight, self.first, self.ranks)

    def gather_logits(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits of this rank's rows -> logits of the whole vocabulary, without padding and without a gradient."""
        if self.ranks.size == 1:
            return logits
        # Padded rows are all on the last ranks, so every piece has one shape, and cutting the end off is enough.
        pieces = [torch.empty_like(logits) for _ in range(self.ranks.size)]
        dist.all_gather(pieces, logits.contiguous(), group=self.ranks.group)
        return torch.cat(pieces, -1)[..., : self.size]


def embed_stream(token_C: torch.Tensor, weight_VD: torch.Tensor, first: int, ranks: TensorRanks) -> torch.Tensor:
    """int64[C] -> this rank's stream of their embeddings [S, D]; weight: the rows of the ids from `first` on.

    One rank takes ids of any shape [...], and raises IndexError for one that has no row.
    """
    return _EmbedStream.apply(token_C, weight_VD, first, ranks)


class _EmbedContext(NodeContext):
    ranks: TensorRanks
    rows: int


class _EmbedStream(torch.autograd.Function):
    """Keeps no weight: the gradient needs its number of rows alone."""

    @staticmethod
    def forward(
        ctx: _EmbedContext, token: torch.Tensor, weight: torch.Tensor, first: int, ranks: TensorRanks
    ) -> torch.Tensor:
        ctx.rows, ctx.ranks = weight.shape[0], ranks
        if ranks.size == 1:
            ctx.save_for_backward(token)
            return F.embedding(token, weight)
        row = token - first
        elsewhere = (row < 0) | (row >= ctx.rows)
        # Ids of other ranks read row 0 and count as zeros, so that the sum over the ranks has each embedding once.
        row = row.masked_fill_(elsewhere, 0)
        ctx.save_for_backward(row, elsewhere)
        return ranks.reduce(F.embedding(row, weight).masked_fill_(elsewhere.unsqueeze(-1), 0)).wait()

    @staticmethod
    def backward(ctx: _EmbedContext, *grads: torch.Tensor) -> Gradients:
        row, *elsewhere = ctx.saved_tensors
        grad = ctx.ranks.gather(grads[0]).wait()
        if elsewhere:  # ids of other ranks were looked up in row 0, which must not learn from them
            grad = grad.masked_fill(elsewhere[0].unsqueeze(-1), 0)
        # What F.embedding's own backward calls, so one rank has the same bits as with torch's node.
        return None, torch.ops.aten.embedding_dense_backward(grad, row, ctx.rows, -1, False), None, None
