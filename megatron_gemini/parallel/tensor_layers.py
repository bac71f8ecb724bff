"""Tensor-parallel layers: megatron-core's, with the interface, names and placements of `layers.py`.

Importing this imports megatron.core, which takes seconds: `Layers` does so only when there is something to divide.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from megatron.core.model_parallel_config import ModelParallelConfig
from torch import nn

from megatron_gemini.kernels.attention import AttentionPlan, attention
from megatron_gemini.kernels.linear import gated_linear, linear
from megatron_gemini.kernels.norm import rms_norm
from megatron_gemini.kernels.rope import Rotation, rotate
from megatron_gemini.parallel.division import Attend, VocabularyShard
from megatron_gemini.parallel.parameters import Init, Placement, declare, new_parameter, zeros
from megatron_gemini.parallel.topology import Topology


def _config(topology: Topology) -> ModelParallelConfig:
    return ModelParallelConfig(
        tensor_model_parallel_size=topology.tensor_size,
        use_cpu_initialization=True,  # memory on torch's default device, whichever that is
        perform_initialization=False,  # values come from parameters.initialize
        params_dtype=torch.get_default_dtype(),
        gradient_accumulation_fusion=False,
    )


def _no_values(_: torch.Tensor) -> None:
    """megatron-core's init_method: there is nothing to do."""


class _PlainState:
    """megatron-core adds an `_extra_state` entry to every linear's state dict; a plain torch module has none."""

    get_extra_state = nn.Module.get_extra_state
    set_extra_state = nn.Module.set_extra_state

    def _forget_extra_state(self) -> None:
        self._load_state_dict_pre_hooks.clear()  # type: ignore[attr-defined]


class _Column(_PlainState, tensor_parallel.ColumnParallelLinear):
    """megatron-core's column-parallel product without a weight: the module that owns the weight passes it."""

    def __init__(self, topology: Topology, width_in: int, width_out: int) -> None:
        super().__init__(
            width_in,
            width_out,
            config=_config(topology),
            init_method=_no_values,
            bias=False,
            skip_weight_param_allocation=True,
            tp_group=topology.tensor_group,
        )
        self._forget_extra_state()

    def forward(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return super().forward(x, weight)[0]


def _divided_rows(topology: Topology, *shape: int, init: Init) -> nn.Parameter:
    """A parameter [..., out, in] of which every rank holds its share of `out`."""
    *lead, rows, columns = shape
    local = rows // topology.tensor_size
    placement = Placement(len(lead), shape, topology.tensor_rank * local)
    return new_parameter(*lead, local, columns, init=init, placement=placement)


class DividedAttentionInput(nn.Module):
    """`layers.AttentionInput`: query heads divided, key/value heads divided too or whole on every rank."""

    def __init__(
        self,
        topology: Topology,
        width: int,
        query: int,
        key: int,
        head_width: int,
        *,
        key_divided: bool,
        eps: float,
        init: Init,
    ) -> None:
        super().__init__()
        self.head_width = head_width
        self.norm = new_parameter(width, init=zeros())
        self.query = _divided_rows(topology, query, width, init=init)
        whole = new_parameter(2, key, width, init=init)
        self.key_value = _divided_rows(topology, 2, key, width, init=init) if key_divided else whole
        self.column = _Column(topology, width, query)
        self.key_group = topology.tensor_group if key_divided else None
        self.eps = eps

    def forward(self, h_TD: torch.Tensor) -> tuple[torch.Tensor, ...]:
        normed = rms_norm(h_TD, self.norm, self.eps)
        query = self.column(normed, self.query).view(len(h_TD), -1, self.head_width)
        key_value = linear(normed, self.key_value, self.key_group).view(len(h_TD), 2, -1, self.head_width)
        return query, *key_value.unbind(1)


class DividedMLP(nn.Module):
    """`layers.MLP`, divided over its inner width.

    The first product is this package's: megatron-core's wants a matrix, and one made of the two halves would be a view,
    which autograd would keep alive after ZeRO-3 has partitioned the parameter.
    """

    def __init__(
        self,
        topology: Topology,
        width: int,
        mlp_width: int,
        activation: str,
        *,
        eps: float,
        init: Init,
        last: Init,
    ) -> None:
        super().__init__()
        self.norm = new_parameter(width, init=zeros())
        self.gate_up = _divided_rows(topology, 2, mlp_width, width, init=init)
        local = mlp_width // topology.tensor_size
        placement = Placement(1, (width, mlp_width), topology.tensor_rank * local)
        self.down = new_parameter(width, local, init=last, placement=placement)
        self.group = topology.tensor_group
        self.activation = activation
        self.eps = eps

    def forward(self, h_TD: torch.Tensor) -> torch.Tensor:
        inner = gated_linear(rms_norm(h_TD, self.norm, self.eps), self.gate_up, self.activation, self.group)
        product = tensor_parallel.linear_with_grad_accumulation_and_async_allreduce(
            inner, self.down, None, gradient_accumulation_fusion=False, allreduce_dgrad=False, sequence_parallel=False
        )
        return h_TD + tensor_parallel.reduce_from_tensor_model_parallel_region(product, group=self.group)


class DividedAttentionOutput(_PlainState, tensor_parallel.RowParallelLinear):
    """`layers.AttentionOutput` of the query heads of every rank."""

    def __init__(self, topology: Topology, width_in: int, width_out: int, *, init: Init) -> None:
        super().__init__(
            width_in,
            width_out,
            config=_config(topology),
            init_method=_no_values,
            bias=False,
            input_is_parallel=True,
            skip_bias_add=False,
            tp_group=topology.tensor_group,
        )
        self._forget_extra_state()
        declare(self.weight, init, Placement(1, (width_out, width_in), topology.tensor_rank * self.weight.shape[1]))

    def forward(
        self,
        h_TD: torch.Tensor,
        q_TNH: torch.Tensor,
        k_TKH: torch.Tensor,
        v_TKH: torch.Tensor,
        plan: AttentionPlan,
        turn: Rotation,
        attend: Attend | None = None,
    ) -> torch.Tensor:
        if attend is None:
            out_TNH = attention(q_TNH, k_TKH, v_TKH, plan, turn=turn)
        else:
            out_TNH = attend(rotate(q_TNH, turn), rotate(k_TKH, turn), v_TKH, plan)
        return h_TD + super().forward(out_TNH.flatten(1))[0]


class DividedVocabulary(tensor_parallel.VocabParallelEmbedding):
    """`layers.Vocabulary` divided by rows over the tensor-parallel ranks.

    The rows are padded to a multiple of the ranks; the padding is zero, masked from the softmax and in no checkpoint.
    """

    def __init__(self, topology: Topology, size: int, width: int, *, init: Init) -> None:
        rows = -(-size // topology.tensor_size)
        config = _config(topology)
        super().__init__(
            rows * topology.tensor_size,
            width,
            init_method=_no_values,
            config=config,
            tp_group=topology.tensor_group,
        )
        first = topology.tensor_rank * rows
        declare(self.weight, init, Placement(0, (size, width), first))
        self.shard = VocabularyShard(first, rows, size, topology.tensor_group)

    def forward(self, x: torch.Tensor, as_head: bool = False) -> torch.Tensor:
        return linear(x, self.weight, self.tp_group) if as_head else super().forward(x)

    def gather_logits(self, logits: torch.Tensor) -> torch.Tensor:
        # megatron-core's gather allocates on the current CUDA device, which ranks on CPU do not have.
        pieces = [torch.empty_like(logits) for _ in range(self.tp_group.size())]
        dist.all_gather(pieces, logits.contiguous(), group=self.tp_group)
        return torch.cat(pieces, -1)[..., : self.shard.size]
