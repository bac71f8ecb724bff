"""The modules of the toy connectors.

Shape suffixes: X embeddings of an encoder, E its width, S runs of them; D model width, C tokens, M embeddings of a
memory, N heads of this rank, H head width.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from megatron_gemini.kernels.attention.api import attention
from megatron_gemini.kernels.attention.plan import CrossAttentionPlan
from megatron_gemini.modalities.transformer import linear
from megatron_gemini.parallel.collectives import TensorRanks, gather_stream
from megatron_gemini.parallel.parameters import Placement, new_parameter, normal
from megatron_gemini.parallel.tensor.layers import LayerFactory


class Halving(nn.Module):
    """The mean of every two neighbors of a run, through a linear layer; the last of an odd run is alone."""

    def __init__(self, width: int, model_width: int) -> None:
        super().__init__()
        self.projection = linear(width, model_width)

    def forward(self, e_XE: torch.Tensor, length_S: torch.Tensor) -> torch.Tensor:
        """[sum of half of length_S, rounded up, D]."""
        halves_S = (length_S + 1) // 2
        run_X = torch.repeat_interleave(length_S, output_size=len(e_XE))
        place_X = torch.arange(len(e_XE)) - (length_S.cumsum(0) - length_S)[run_X]
        pair_X = (halves_S.cumsum(0) - halves_S)[run_X] + place_X // 2
        sums = e_XE.new_zeros(int(halves_S.sum()), e_XE.shape[1]).index_add(0, pair_X, e_XE)
        counts = torch.bincount(pair_X).to(e_XE.dtype)
        return self.projection(sums / counts[:, None])


class Reader(nn.Module):
    """h + attention(h, memory), with plain heads that the tensor-parallel ranks share out.

    The weights are whole on every rank, and each computes the part of their gradients that its heads have.
    """

    def __init__(self, width: int, heads: int, head_width: int, layers: LayerFactory) -> None:
        super().__init__()
        self.ranks = ranks = layers.ranks
        self.heads, self.head_width = heads // ranks.size, head_width
        self.mine = slice(*(self.heads * head_width * (ranks.rank + end) for end in (0, 1)))
        whole = heads * head_width

        def weight(*shape: int) -> nn.Parameter:
            placement = Placement(None, shape, partial=ranks.size > 1)
            return new_parameter(*shape, init=normal(1 / math.sqrt(width)), placement=placement)

        self.query, self.output = weight(whole, width), weight(width, whole)
        self.key_value = weight(2, whole, width)

    def forward(self, h_SD: torch.Tensor, memory_MD: torch.Tensor, plan: CrossAttentionPlan) -> torch.Tensor:
        h_CD = gather_stream(h_SD, self.ranks)
        q_CNH = (h_CD @ self.query[self.mine].t()).unflatten(1, (self.heads, self.head_width))
        k_MNH, v_MNH = (
            (memory_MD.to(h_CD.dtype) @ weight[self.mine].t()).unflatten(1, (self.heads, self.head_width))
            for weight in self.key_value
        )
        out_CD = attention(q_CNH, k_MNH, v_MNH, plan).flatten(1) @ self.output[:, self.mine].t()
        return h_SD + _ReduceStream.apply(out_CD, self.ranks)


class _ReduceStream(torch.autograd.Function):
    """This rank's stream of the sum of every rank's part; the gradient of `gather_stream`."""

    @staticmethod
    def forward(ctx, x_CD: torch.Tensor, ranks: TensorRanks) -> torch.Tensor:
        ctx.ranks = ranks
        return ranks.reduce(x_CD.clone()).wait()

    @staticmethod
    def backward(ctx, grad_SD: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.ranks.gather(grad_SD).wait(), None
