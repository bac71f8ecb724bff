"""Tensor-parallel layers, with the interface, names and placements of `layers.py`.

The embedding is megatron-core's. Its linear layers cannot share one input gradient between queries and replicated keys,
and under sequence parallelism run on CUDA only, so the products are `tensor_products.py`'s. Importing this imports
megatron.core, which takes seconds: `LayerFactory` does so only when there is something to divide.

Shape suffixes: T = C tokens of the (context-local) row, S tokens of this rank's stream (C without sequence
parallelism), D model width, N query heads of this rank, K key/value heads that they read, H head width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from megatron.core.model_parallel_config import ModelParallelConfig
from torch import nn

from megatron_gemini.kernels.attention.api import AttentionPlan, attention
from megatron_gemini.kernels.linear import linear
from megatron_gemini.kernels.rope import CosSin, apply_rope
from megatron_gemini.parallel.collectives import TensorRanks
from megatron_gemini.parallel.parameters import Init, Placement, declare, new_parameter, zeros
from megatron_gemini.parallel.tensor.products import embed_stream, gated_mlp, norm_query_key_value, project_add
from megatron_gemini.parallel.tensor.shards import Attend, FusedHead, HeadShard, VocabularyShard
from megatron_gemini.parallel.topology import Topology


def no_init(_: torch.Tensor) -> None:
    """megatron-core's init_method: there is nothing to do."""


def _divided_rows(topology: Topology, *shape: int, init: Init) -> nn.Parameter:
    """A parameter [..., out, in] of which every rank holds its share of `out`."""
    *lead, rows, columns = shape
    local = rows // topology.tensor_size
    placement = Placement(len(lead), shape, topology.tensor_rank * local)
    return new_parameter(*lead, local, columns, init=init, placement=placement)


def _whole(*shape: int, init: Init, partial: bool) -> nn.Parameter:
    """A parameter that every rank holds; partial: and of whose gradient it computes a part."""
    return new_parameter(*shape, init=init, placement=Placement(None, shape, partial=partial))


def _divided_columns(topology: Topology, rows: int, columns: int, *, init: Init) -> nn.Parameter:
    """A parameter [out, in] of which every rank holds its share of `in`."""
    local = columns // topology.tensor_size
    placement = Placement(1, (rows, columns), topology.tensor_rank * local)
    return new_parameter(rows, local, init=init, placement=placement)


class TensorParallelAttentionInput(nn.Module):
    """`layers.AttentionInput`: query heads divided, key/value heads divided too or whole on every rank."""

    def __init__(
        self, topology: Topology, width: int, shard: HeadShard, key: int, head_width: int, *, eps: float, init: Init
    ) -> None:
        """key: width of all key/value heads together."""
        super().__init__()
        self.norm = _whole(width, init=zeros(), partial=topology.sequence)
        self.query = _divided_rows(topology, shard.query * head_width * topology.tensor_size, width, init=init)
        if shard.whole:
            self.key_value = _whole(2, key, width, init=init, partial=True)
        else:
            self.key_value = _divided_rows(topology, 2, key, width, init=init)
        self.shard = shard
        self.ranks = TensorRanks.of(topology)
        self.eps = eps

    def forward(self, h_SD: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return norm_query_key_value(h_SD, self.norm, self.eps, self.query, self.key_value, self.shard, self.ranks)


class TensorParallelMLP(nn.Module):
    """`layers.MLP`, divided over its inner width."""

    def __init__(
        self, topology: Topology, width: int, mlp_width: int, activation: str, *, eps: float, init: Init, last: Init
    ) -> None:
        super().__init__()
        self.norm = _whole(width, init=zeros(), partial=topology.sequence)
        self.gate_up = _divided_rows(topology, 2, mlp_width, width, init=init)
        self.down = _divided_columns(topology, width, mlp_width, init=last)
        self.ranks = TensorRanks.of(topology)
        self.activation = activation
        self.eps = eps

    def forward(self, h_SD: torch.Tensor) -> torch.Tensor:
        return gated_mlp(h_SD, self.norm, self.eps, self.gate_up, self.down, self.activation, self.ranks)


class TensorParallelAttentionOutput(nn.Module):
    """`layers.AttentionOutput` of the query heads of every rank."""

    def __init__(self, topology: Topology, width_in: int, width: int, *, init: Init) -> None:
        super().__init__()
        self.weight = _divided_columns(topology, width, width_in, init=init)
        self.ranks = TensorRanks.of(topology)

    def forward(
        self,
        h_SD: torch.Tensor,
        q_TNH: torch.Tensor,
        k_TKH: torch.Tensor,
        v_TKH: torch.Tensor,
        plan: AttentionPlan,
        cos_sin: CosSin,
        attend: Attend | None = None,
    ) -> torch.Tensor:
        if attend is None:
            out_TNH = attention(q_TNH, k_TKH, v_TKH, plan, cos_sin=cos_sin)
        else:
            out_TNH = attend(apply_rope(q_TNH, cos_sin), apply_rope(k_TKH, cos_sin), v_TKH, plan)
        return project_add(out_TNH, self.weight, h_SD, self.ranks)


class TensorParallelVocabulary(tensor_parallel.VocabParallelEmbedding):
    """`layers.Vocabulary` divided by rows over the tensor-parallel ranks.

    The rows are padded to a multiple of the ranks; the padding is zero, masked from the softmax and in no checkpoint.
    input_group: ranks over which the gradient of the head's input is summed; None where `gather_stream`, which gathered
        that input, sums and divides it in one (sequence parallelism).
    """

    def __init__(self, topology: Topology, size: int, width: int, *, init: Init) -> None:
        rows = -(-size // topology.tensor_size)
        config = ModelParallelConfig(
            tensor_model_parallel_size=topology.tensor_size,
            use_cpu_initialization=True,  # memory on torch's default device, whichever that is
            perform_initialization=False,  # values come from parameters.initialize
            params_dtype=torch.get_default_dtype(),
        )
        super().__init__(
            rows * topology.tensor_size,
            width,
            init_method=no_init,
            config=config,
            tp_group=topology.tensor_group,
        )
        first = topology.tensor_rank * rows
        declare(self.weight, init, Placement(0, (size, width), first))
        self.shard = VocabularyShard(first, rows, size, topology.tensor_group)
        self.ranks = TensorRanks.of(topology)
        self.input_group = None if topology.sequence else topology.tensor_group

    def forward(self, x: torch.Tensor, as_head: bool = False, fused: FusedHead | None = None) -> Any:
        """As `layers.Vocabulary`; embeddings of the row's ids [C] are this rank's stream of them, [S, D]."""
        if fused is not None:
            place = {"first": self.shard.first, "size": self.shard.size, "group": self.tp_group}
            return fused(x, self.weight, reduce_input_gradient=self.input_group is not None, **place)
        if as_head:
            return linear(x, self.weight, self.input_group)
        if self.ranks.sequence:  # megatron-core's own form of this wants [S, B, D] and a CUDA device
            return embed_stream(x, self.weight, self.shard.first, self.ranks)
        return super().forward(x)

    def gather_logits(self, logits: torch.Tensor) -> torch.Tensor:
        # megatron-core's gather allocates on the current CUDA device, which ranks on CPU do not have.
        pieces = [torch.empty_like(logits) for _ in range(self.tp_group.size())]
        dist.all_gather(pieces, logits.contiguous(), group=self.tp_group)
        return torch.cat(pieces, -1)[..., : self.shard.size]
