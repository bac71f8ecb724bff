"""Tensor-parallel layers: megatron-core's, with the interface, names and placements of `layers.py`.

Importing this imports megatron.core, which takes seconds: `Layers` does so only when there is something to divide.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.model_parallel_config import ModelParallelConfig
from torch import nn

from megatron_gemini.kernels.linear import linear
from megatron_gemini.parallel.layers import VocabularyShard
from megatron_gemini.parallel.parameters import Init, Placement, declare, new_parameter
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


class ColumnLinear(_PlainState, tensor_parallel.ColumnParallelLinear):
    """`layers.Linear` whose `out` dimension is divided over the tensor-parallel ranks."""

    def __init__(self, topology: Topology, width_in: int, width_out: int, *, parts: int, init: Init) -> None:
        super().__init__(
            width_in,
            parts * width_out,
            config=_config(topology),
            init_method=_no_values,
            bias=False,
            skip_weight_param_allocation=True,
            tp_group=topology.tensor_group,
        )
        self._forget_extra_state()
        local = width_out // topology.tensor_size
        lead = () if parts == 1 else (parts,)
        placement = Placement(len(lead), (*lead, width_out, width_in), topology.tensor_rank * local)
        self.weight = new_parameter(*lead, local, width_in, init=init, placement=placement)

    def _forward_impl(self, input: torch.Tensor, weight: torch.Tensor, **options: Any) -> torch.Tensor:
        """megatron-core's product wants a matrix; a stack of parts must not become one before autograd saves it."""
        if weight.dim() == 2:
            return super()._forward_impl(input, weight, **options)
        return linear(input, weight, options["tp_group"])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x)[0]


class RowLinear(_PlainState, tensor_parallel.RowParallelLinear):
    """`layers.Linear` whose `in` dimension is divided over the tensor-parallel ranks."""

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

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x)[0]


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
        full = tensor_parallel.gather_from_tensor_model_parallel_region(logits, group=self.tp_group)
        return full[..., : self.shard.size]
