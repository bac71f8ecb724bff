"""A rank's pieces of all parameters, which ZeRO keeps somewhere else at each stage, seen alike.

Of every parameter the range of its tensor-parallel shard that this rank owns, with the float32 master weights, Adam's
moments and the gradient as flat views.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from megatron_gemini.engine.internals.swapping import SwappedGroups

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Fragment:
    """This rank's piece of one parameter: elements [start, start + count) of its flattened tensor-parallel shard."""

    name: str
    parameter: nn.Parameter
    shard_shape: tuple[int, ...]
    start: int
    count: int
    master: Callable[[], torch.Tensor]
    """float32[count], a view of the master weights."""
    moment: Callable[[str], torch.Tensor]
    """float32[count], a view of one of Adam's moments; exists after `ensure_moments`."""
    gradient: Callable[[], torch.Tensor | None]
    """Flat view of the averaged gradient (count elements or more, zeros behind); None where there was none."""
    group: int = 0
    """Views of another group may be void once one of this group has been taken: those on disk come in one at a time."""


def fragments(engine: Any) -> list[Fragment]:
    """The pieces that this rank owns, in the order of the module's parameters; frozen parameters are left out."""
    stage, optimizer = engine.zero_optimization_stage(), engine.optimizer
    named = [(name, p) for name, p in engine.module.named_parameters() if p.requires_grad]
    if stage == 3:
        groups = engine.swapped_groups = getattr(engine, "swapped_groups", None) or SwappedGroups(optimizer)
        pieces = [_stage3(name, p, optimizer, groups) for name, p in named]
        return sorted(
            pieces, key=lambda piece: piece.group
        )  # so that a pass over all of them brings each group in once
    if hasattr(optimizer, "bit16_groups") or hasattr(optimizer, "bf16_groups"):
        return [f for name, p in named if (f := _stage12(name, p, optimizer)) is not None]
    return [_stage0(name, p, optimizer) for name, p in named]


def _stage0(name: str, parameter: nn.Parameter, optimizer: Any) -> Fragment:
    """Every rank owns all: plain torch in fp32, DeepSpeed's wrapper with float32 copies in bf16."""
    master: torch.Tensor = parameter
    basic = optimizer
    if hasattr(optimizer, "fp32_groups"):
        basic = optimizer.optimizer
        for low_group, high_group in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            for low, high in zip(low_group, high_group, strict=True):
                if low is parameter:
                    master = high
    return Fragment(
        name,
        parameter,
        tuple(parameter.shape),
        0,
        parameter.numel(),
        lambda: master.data.view(-1),
        lambda key: basic.state[master][key].view(-1),
        lambda: None if parameter.grad is None else parameter.grad.view(-1),
    )


def _stage12(name: str, parameter: Any, optimizer: Any) -> Fragment | None:
    """ZeRO-1 and 2: the flat groups are cut without regard to parameters; None where this rank holds nothing."""
    mapping = parameter._hp_mapping
    if mapping is None:
        return None
    address = mapping.lp_fragment_address
    return Fragment(
        name,
        parameter,
        tuple(parameter.shape),
        address.start,
        address.numel,
        lambda: mapping.hp_fragment.data.view(-1),
        lambda key: _stage12_moment(key, mapping, optimizer),
        lambda: _stage12_gradient(parameter, mapping, optimizer),
    )


def _stage12_moment(key: str, mapping: Any, optimizer: Any) -> torch.Tensor:
    # Not DeepSpeed's own link: it is made after the first group's first step and misses the other groups.
    masters = getattr(optimizer, "single_partition_of_fp32_groups", None) or optimizer.fp32_groups_flat_partition
    address = mapping.hp_fragment_address
    return optimizer.optimizer.state[masters[mapping.param_group_index]][key].narrow(0, address.start, address.numel)


def _stage12_gradient(parameter: Any, mapping: Any, optimizer: Any) -> torch.Tensor | None:
    address = mapping.lp_fragment_address
    if getattr(optimizer, "cpu_offload", False):
        group, _, offset, count = optimizer.grad_position[optimizer.get_param_id(parameter)]
        return optimizer.single_partition_of_fp32_groups[group].grad.narrow(0, offset, count)
    gradient = mapping.get_lp_grad_fragment(parameter._index_in_param_group)
    if gradient is None:
        return None
    flat = gradient.reshape(-1)
    whole = flat.numel() == parameter.numel() and address.numel != parameter.numel()
    return flat.narrow(0, address.start, address.numel) if whole else flat


def _stage3(name: str, parameter: Any, optimizer: Any, groups: SwappedGroups) -> Fragment:
    """ZeRO-3: every parameter is cut into equal pieces, the last one padded with zeros."""
    piece = parameter.ds_tensor.ds_numel
    start = piece * optimizer._get_param_partition_rank(parameter)
    count = max(0, min(piece, parameter.ds_numel - start))
    group, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]

    def state(key: str | None) -> torch.Tensor:
        groups.enter(group, changes_state=True)
        whole = optimizer.fp32_partitioned_groups_flat[group]
        whole = whole if key is None else optimizer.optimizer.state[whole][key]
        return whole.narrow(0, offset, count)

    def gradient() -> torch.Tensor:
        if not optimizer.offload_optimizer:
            return optimizer._get_fp32_grad_state_partition(parameter, release_swap_buffers=False)[0]
        groups.enter(group)
        return optimizer.fp32_partitioned_groups_flat[group].grad.narrow(0, offset, size)

    shape = tuple(parameter.ds_shape)
    return Fragment(name, parameter, shape, start, count, lambda: state(None).data, state, gradient, group)
