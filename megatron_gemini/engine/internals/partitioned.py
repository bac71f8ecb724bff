"""Parameters under ZeRO-3: their partitions, and the initial values in them.

Values are a pure function of (seed, parameter name, global index). So each rank generates the parameters that it holds
a part of, one at a time and without any communication, and keeps the part.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeGuard, cast

import torch
from torch import nn

from megatron_gemini.engine.internals.fragments import Fragment
from megatron_gemini.engine.internals.release import Use
from megatron_gemini.engine.internals.types import Partition as PartitionTensor
from megatron_gemini.engine.internals.types import PartitionedParameter
from megatron_gemini.parallel.parameters import declare, init_of, initialize_parameter, placement_of


def is_partitioned(parameter: nn.Parameter) -> TypeGuard[PartitionedParameter]:
    """Whether ZeRO-3 has made this parameter, or taken it over."""
    return hasattr(parameter, "ds_tensor")


def uses(module: nn.Module) -> Iterator[Use]:
    """What is touched of the parameters of a module under ZeRO-3."""
    for parameter in module.parameters():
        yield Use(parameter, PartitionedParameter)
        yield Use(cast(PartitionedParameter, parameter).ds_tensor, PartitionTensor)


def owned_range(parameter: PartitionedParameter, rank: int) -> tuple[int, int]:
    """(first element, elements) of the flattened parameter that the data rank `rank` holds, padding left out."""
    start = parameter.ds_tensor.ds_numel * rank
    return start, max(0, min(parameter.ds_tensor.ds_numel, parameter.ds_numel - start))


@torch.no_grad()
def fill_initial_values(module: nn.Module, seed: int) -> None:
    """Set every parameter of `module`, whole or partitioned by ZeRO-3."""
    for name, parameter in module.named_parameters():
        if not is_partitioned(parameter):
            initialize_parameter(name, parameter, seed)
            continue
        piece = parameter.ds_tensor
        # Whole for a moment, one parameter at a time, and not gathered: every rank would have to make the same call.
        whole = nn.Parameter(torch.empty(tuple(parameter.ds_shape), dtype=parameter.dtype, device=piece.device))
        initialize_parameter(name, declare(whole, init_of(parameter), placement_of(parameter)), seed)
        start, count = owned_range(parameter, torch.distributed.get_rank(parameter.ds_process_group))
        piece.data.zero_()
        # The last ranks may hold nothing but padding, and begin behind the end.
        piece.data.narrow(0, 0, count).copy_(whole.data.view(-1).narrow(0, min(start, parameter.ds_numel), count))


def frozen_fragment(name: str, parameter: nn.Parameter, rank: int) -> Fragment:
    """The piece of a parameter that is not trained, whole or partitioned; its master is the weight itself.

    rank: this one's among the data ranks. Its `moment` raises ValueError.
    """
    if is_partitioned(parameter):
        shape, (start, count) = tuple(parameter.ds_shape), owned_range(parameter, rank)
        flat = parameter.ds_tensor.data.narrow(0, 0, count)
    else:
        shape, start, flat = tuple(parameter.shape), 0, parameter.data.view(-1)

    def no_moment(key: str) -> torch.Tensor:
        raise ValueError(f"{name} is frozen and has no {key}")

    return Fragment(name, parameter, shape, start, len(flat), lambda: flat, no_moment, lambda: None)
