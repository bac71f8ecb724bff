"""The modules of a decoder layer, whatever the number of tensor-parallel ranks.

Widths and numbers of heads are those of the whole model; what a module holds and computes is this rank's share. One
rank holds everything. `std` is the deviation of the initial weights.

Shape suffixes: T tokens of the row, C tokens of this context rank, S tokens of this rank's stream. D model width.
N query heads of this rank, K key/value heads that they read, H head width. F this rank's share of the inner width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from megatron_gemini.kernels.attention.api import AttentionPlan
from megatron_gemini.kernels.norm import rms_norm
from megatron_gemini.kernels.rope import CosSin, apply_rope
from megatron_gemini.parallel.collectives import TensorRanks
from megatron_gemini.parallel.parameters import Placement, new_parameter, new_sharded_parameter, normal
from megatron_gemini.parallel.tensor.attention_input import norm_query_key_value
from megatron_gemini.parallel.tensor.attention_output import attention_output
from megatron_gemini.parallel.tensor.heads import HeadShard
from megatron_gemini.parallel.tensor.products import gated_mlp, project_add

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, AttentionPlan], torch.Tensor]
"""Rotated q_CNH and k_CKH, v_CKH and the row's plan -> [C, N, H]."""


def _replicated(*shape: int, std: float, partial: bool) -> nn.Parameter:
    """A parameter that every rank holds whole; partial: and of whose gradient it computes a part."""
    return new_parameter(*shape, init=normal(std), placement=Placement(None, shape, partial=partial))


class AttentionInput(nn.Module):
    """RMSNorm, then the projections: h_SD -> queries [C, N, H], keys [C, K, H], values [C, K, H].

    query: [N H, D]. key_value: [2, heads held * H, D]. norm: [D], of scale 1 + norm.
    """

    def __init__(
        self, ranks: TensorRanks, width: int, query_heads: int, key_heads: int, head_width: int, eps: float, std: float
    ) -> None:
        super().__init__()
        self.ranks = ranks
        self.shard = HeadShard.of(query_heads, key_heads, ranks.size, ranks.rank)
        self.eps = eps
        # Under sequence parallelism a rank's norm sees the rank's own tokens only.
        self.norm = _replicated(width, std=0.0, partial=ranks.sequence)
        self.query = new_sharded_parameter(ranks, 0, query_heads * head_width, width, init=normal(std))
        if self.shard.whole:  # each rank's queries give another gradient for the keys and values that all ranks have
            self.key_value = _replicated(2, key_heads * head_width, width, std=std, partial=True)
        else:
            self.key_value = new_sharded_parameter(ranks, 1, 2, key_heads * head_width, width, init=normal(std))

    def forward(self, h_SD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return norm_query_key_value(h_SD, self.norm, self.eps, self.query, self.key_value, self.shard, self.ranks)


class AttentionOutput(nn.Module):
    """h + attention(q, k, v) W^T. weight: [D, N H]."""

    def __init__(self, ranks: TensorRanks, width_in: int, width: int, std: float) -> None:
        super().__init__()
        self.ranks = ranks
        self.weight = new_sharded_parameter(ranks, 1, width, width_in, init=normal(std))

    def forward(
        self,
        h_SD: torch.Tensor,
        q_CNH: torch.Tensor,
        k_TKH: torch.Tensor,
        v_TKH: torch.Tensor,
        plan: AttentionPlan,
        cos_sin: CosSin,
        attend: Attend | None = None,
    ) -> torch.Tensor:
        """attend: takes the place of the row's own attention, as generation from a cache does."""
        if attend is None:  # training: attention may be part of the product's node
            return attention_output(q_CNH, k_TKH, v_TKH, plan, cos_sin, self.weight, h_SD, self.ranks)
        out_CNH = attend(apply_rope(q_CNH, cos_sin), apply_rope(k_TKH, cos_sin), v_TKH, plan)
        return project_add(out_CNH, self.weight, h_SD, self.ranks)


class MLP(nn.Module):
    """h + down(activation(gate n) * up n) with n = RMSNorm(h). gate_up: [2, F, D]. down: [D, F]. norm: [D].

    last_std: of `down`, which ends the residual branch.
    """

    def __init__(
        self, ranks: TensorRanks, width: int, mlp_width: int, activation: str, eps: float, std: float, last_std: float
    ) -> None:
        super().__init__()
        self.ranks = ranks
        self.activation = activation
        self.eps = eps
        self.norm = _replicated(width, std=0.0, partial=ranks.sequence)
        # Gate and up along a dimension of their own: one [2 F, D] divided by rows would give a rank rows of one alone.
        self.gate_up = new_sharded_parameter(ranks, 1, 2, mlp_width, width, init=normal(std))
        self.down = new_sharded_parameter(ranks, 1, width, mlp_width, init=normal(last_std))

    def forward(self, h_SD: torch.Tensor) -> torch.Tensor:
        return gated_mlp(h_SD, self.norm, self.eps, self.gate_up, self.down, self.activation, self.ranks)


class RMSNorm(nn.Module):
    """x / rms(x) * (1 + weight) over the last dimension, `width` wide.

    partial: tensor-parallel ranks see different heads or tokens, so each computes a partial gradient of the weight.
    """

    def __init__(self, width: int, eps: float, partial: bool) -> None:
        super().__init__()
        self.eps = eps
        # Zeros, since the scale is 1 + weight: a norm begins without one.
        self.weight = _replicated(width, std=0.0, partial=partial)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps)
