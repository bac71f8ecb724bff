"""The decoder's layers, whatever the number of tensor-parallel ranks: one interface, one set of parameter names.

A model asks `LayerFactory` for a layer and never learns whether it is divided. Serial layers are plain torch; divided
ones are megatron-core's (`tensor_layers.py`, imported only then).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from megatron_gemini.kernels.attention.api import AttentionPlan, attention_output
from megatron_gemini.kernels.linear import gated_mlp, linear, linear_add, norm_linear
from megatron_gemini.kernels.norm import rms_norm
from megatron_gemini.kernels.rope import CosSin, apply_rope
from megatron_gemini.parallel.collectives import TensorRanks, gather_stream
from megatron_gemini.parallel.context.positions import context_positions, stream_positions
from megatron_gemini.parallel.context.ranks import ContextRanks
from megatron_gemini.parallel.parameters import Init, Placement, new_parameter, normal, zeros
from megatron_gemini.parallel.tensor.shards import Attend, FusedHead, HeadShard, VocabularyShard
from megatron_gemini.parallel.topology import Topology


class AttentionInput(nn.Module):
    """RMSNorm, then the projections: h_TD -> queries [T, N, H], keys [T, K, H], values [T, K, H].

    query: [N H, D]. key_value: [2, K H, D]. norm: [D], of scale 1 + norm.
    """

    def __init__(self, width: int, query: int, key: int, head_width: int, *, eps: float, init: Init) -> None:
        super().__init__()
        self.head_width = head_width
        self.norm = new_parameter(width, init=zeros())
        self.query = new_parameter(query, width, init=init)
        self.key_value = new_parameter(2, key, width, init=init)
        self.eps = eps

    def forward(self, h_TD: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return norm_linear(h_TD, self.norm, self.eps, self.head_width, (self.query, self.key_value))


class MLP(nn.Module):
    """h + down(activation(gate n) * up n) with n = RMSNorm(h). gate_up: [2, F, D]. down: [D, F]. norm: [D]."""

    def __init__(self, width: int, mlp_width: int, activation: str, *, eps: float, init: Init, last: Init) -> None:
        super().__init__()
        self.norm = new_parameter(width, init=zeros())
        self.gate_up = new_parameter(2, mlp_width, width, init=init)
        self.down = new_parameter(width, mlp_width, init=last)
        self.activation = activation
        self.eps = eps

    def forward(self, h_TD: torch.Tensor) -> torch.Tensor:
        return gated_mlp(h_TD, self.norm, self.eps, self.gate_up, self.down, self.activation)


class AttentionOutput(nn.Module):
    """h + attention(q, k, v) W^T. weight: [D, N H]."""

    def __init__(self, width_in: int, width: int, *, init: Init) -> None:
        super().__init__()
        self.weight = new_parameter(width, width_in, init=init)

    def forward(
        self,
        h_TD: torch.Tensor,
        q_TNH: torch.Tensor,
        k_TKH: torch.Tensor,
        v_TKH: torch.Tensor,
        plan: AttentionPlan,
        cos_sin: CosSin,
        attend: Attend | None = None,
    ) -> torch.Tensor:
        """attend: takes the place of the row's own attention, as generation from a cache does."""
        if attend is None:
            return attention_output(q_TNH, k_TKH, v_TKH, plan, cos_sin, self.weight, h_TD)
        return linear_add(
            attend(apply_rope(q_TNH, cos_sin), apply_rope(k_TKH, cos_sin), v_TKH, plan), self.weight, h_TD
        )


class RMSNorm(nn.Module):
    """x / rms(x) * (1 + weight) over the last dimension, `width` wide.

    partial: tensor-parallel ranks see different heads or tokens, so each computes a partial gradient of the weight.
    """

    def __init__(self, width: int, eps: float, partial: bool = False) -> None:
        super().__init__()
        self.weight = new_parameter(width, init=zeros(), placement=Placement(None, (width,), partial=partial))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps)


class Vocabulary(nn.Module):
    """One row a token id: an embedding, a head, or both when tied.

    All uses go through forward so that ZeRO-3's hooks gather the weight whichever it is.
    """

    def __init__(self, size: int, width: int, *, init: Init) -> None:
        super().__init__()
        self.weight = new_parameter(size, width, init=init)
        self.shard = VocabularyShard(0, size, size, None)

    def forward(self, x: torch.Tensor, as_head: bool = False, fused: FusedHead | None = None) -> Any:
        """int64 ids [...] -> embeddings [..., D]; as_head: hidden [..., D] -> logits [..., rows of this rank].

        fused: hidden [T, D] -> what it makes of them and the weight, such as `kernels.linear_cross_entropy`.
        """
        if fused is not None:
            return fused(x, self.weight, first=0, size=self.shard.size, group=None)
        return linear(x, self.weight) if as_head else nn.functional.embedding(x, self.weight)

    def gather_logits(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits of this rank's rows -> logits of the whole vocabulary, without padding and without a gradient."""
        return logits


class LayerFactory:
    """Makes the layers of one topology. Widths are global; `std` is that of the normal initial weights."""

    def __init__(self, topology: Topology) -> None:
        self.topology = topology

    @property
    def divided(self) -> bool:
        return self.topology.tensor_size > 1

    def attention_input(
        self, width: int, query_heads: int, key_heads: int, head_width: int, *, eps: float, std: float
    ) -> nn.Module:
        """An `AttentionInput`; its output is this rank's query heads and the key/value heads that they read."""
        query, key = query_heads * head_width, key_heads * head_width
        if not self.divided:
            return AttentionInput(width, query, key, head_width, eps=eps, init=normal(std))
        shard = self.heads(query_heads, key_heads)
        layer = self._tensor_layers().TensorParallelAttentionInput
        return layer(self.topology, width, shard, key, head_width, eps=eps, init=normal(std))

    def mlp(self, width: int, mlp_width: int, activation: str, *, eps: float, std: float, last_std: float) -> nn.Module:
        """An `MLP`, divided over its inner width; last_std is that of `down`, which ends the branch."""
        sizes = (width, mlp_width, activation)
        if not self.divided:
            return MLP(*sizes, eps=eps, init=normal(std), last=normal(last_std))
        layer = self._tensor_layers().TensorParallelMLP
        return layer(self.topology, *sizes, eps=eps, init=normal(std), last=normal(last_std))

    def attention_output(self, width_in: int, width: int, *, std: float) -> nn.Module:
        """An `AttentionOutput` of this rank's heads; the output is the stream."""
        if not self.divided:
            return AttentionOutput(width_in, width, init=normal(std))
        return self._tensor_layers().TensorParallelAttentionOutput(self.topology, width_in, width, init=normal(std))

    def embedding(self, size: int, width: int, *, std: float) -> nn.Module:
        """A `Vocabulary` of `size` rows, divided over the ranks (and padded to a multiple of them)."""
        if not self.divided:
            return Vocabulary(size, width, init=normal(std))
        return self._tensor_layers().TensorParallelVocabulary(self.topology, size, width, init=normal(std))

    def norm(self, width: int, eps: float) -> RMSNorm:
        """RMSNorm of the stream."""
        return RMSNorm(width, eps, partial=self.divided and self.topology.sequence)

    def head_norm(self, width: int, eps: float) -> RMSNorm:
        """RMSNorm of every head of queries or keys: ranks have different queries, and their keys serve only those."""
        return RMSNorm(width, eps, partial=self.divided)

    def stream(self, tokens: int, device: torch.device | str = "cpu") -> torch.Tensor:
        """int64[S], ascending: the positions of a row of `tokens` that this rank's stream holds between the layers."""
        return stream_positions(tokens, self.topology, device)

    def gather_stream(self, h_SD: torch.Tensor) -> torch.Tensor:
        """The stream of all tensor-parallel ranks, before the head: [C, D].

        Under sequence parallelism its gradient is summed over the ranks here; the head leaves it a partial gradient.
        """
        if not (self.divided and self.topology.sequence):
            return h_SD
        return gather_stream(h_SD, TensorRanks.of(self.topology))

    def context(self) -> ContextRanks:
        """What brings the row's keys and values together where context-parallel ranks divide its tokens."""
        return ContextRanks(self.topology)

    def context_positions(self, tokens: int, device: torch.device | str = "cpu") -> torch.Tensor | None:
        """int64[C], ascending: the positions of a row of `tokens` that this context rank has; None if all."""
        return context_positions(tokens, self.topology, device) if self.topology.context_size > 1 else None

    def heads(self, query: int, key: int) -> HeadShard:
        """This rank's share of `query` and `key` heads; key heads are divided if there is one or more for each rank."""
        ranks, rank = self.topology.tensor_size, self.topology.tensor_rank
        assert query % ranks == 0, f"{query} query heads on {ranks} ranks"
        if key % ranks == 0:
            return HeadShard(query // ranks, key // ranks)
        first = rank * (query // ranks) // (query // key)
        last = ((rank + 1) * (query // ranks) - 1) // (query // key)
        return HeadShard(query // ranks, last - first + 1, first, whole=True)

    @staticmethod
    def _tensor_layers() -> Any:
        from megatron_gemini.parallel.tensor import parallel_layers  # imports megatron.core, which takes seconds

        return parallel_layers
