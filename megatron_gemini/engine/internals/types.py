"""What this trainer uses of DeepSpeed's objects, as types. This file is the only list of it.

mypy holds that nothing else is used of them. `release.require` holds that the installed DeepSpeed has all of it. A test
holds that this folder uses all that is listed, and no attribute beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ParamSpec, Protocol, TypeVar

import torch
from torch import nn
from torch.distributed import ProcessGroup

# Methods stand here as attributes that can be called: some are replaced on an object, which mypy allows of attributes.

P = ParamSpec("P")
Output_co = TypeVar("Output_co", covariant=True)


class FragmentAddress(Protocol):
    """A range of a flat tensor, in elements."""

    start: int
    numel: int


class FragmentMapping(Protocol):
    """ZeRO-1 and 2: where the part of a parameter that this rank owns lies in the flat float32 group."""

    # "lp" is the weight that the forward reads, "hp" its float32 master: of low and high precision.
    lp_fragment_address: FragmentAddress
    hp_fragment_address: FragmentAddress
    hp_fragment: torch.Tensor
    param_group_index: int
    # By the parameter's index in its group.
    get_lp_grad_fragment: Callable[[int], torch.Tensor | None]


# No Protocols: each is a plain parameter of torch's with attributes that DeepSpeed has set on it.


class MappedParameter(nn.Parameter):
    """A parameter under ZeRO-1 or 2; None for a mapping on a rank that owns nothing of it."""

    _hp_mapping: FragmentMapping | None


class OwnedParameter(MappedParameter):
    """One of which this rank owns a part."""

    _index_in_param_group: int


class Partition(torch.Tensor):
    """This rank's part of a parameter under ZeRO-3, flat, of the same length on all ranks: zeros fill up the last."""

    ds_numel: int


class GatherHandle(Protocol):
    """A gather of weights that is under way."""

    wait: Callable[[], None]


class ParameterStatus(Protocol):
    """DeepSpeed's enumeration of where a parameter is."""

    AVAILABLE: ParameterStatus
    NOT_AVAILABLE: ParameterStatus


class PartitionedParameter(nn.Parameter):
    """A parameter under ZeRO-3. Its own shape is empty while it is not gathered."""

    ds_tensor: Partition
    ds_shape: torch.Size
    ds_numel: int
    ds_status: ParameterStatus
    ds_process_group: ProcessGroup
    # Numbers of the modules that use it now: it stays whole while there is one.
    ds_active_sub_modules: set[int]
    all_gather_coalesced: Callable[[Sequence[PartitionedParameter]], GatherHandle]
    partition: Callable[[], None]


Hook = Callable[..., None]


class HookHandle(Protocol):
    """What torch returns for a hook."""

    id: int
    hooks_dict_ref: Callable[[], dict[int, Hook]]


class ParameterOffload(Protocol):
    """ZeRO-3's gathering and partitioning around every module. An engine without an optimizer has it in its place."""

    fwd_pre_hook: HookHandle
    forward_hooks: list[HookHandle]
    backward_hooks: list[HookHandle]


class UnfusedOptimizer(Protocol):
    """ZeRO-0 in bf16: float32 copies of all weights."""

    optimizer: torch.optim.Optimizer
    # The weights that the forward reads, in bf16 here: DeepSpeed made this class for fp16.
    fp16_groups: list[list[nn.Parameter]]
    fp32_groups: list[list[torch.Tensor]]
    clip_grad: float


class Bf16Optimizer(Protocol):
    """ZeRO-1 in bf16 without offload, with float32 sums of the gradients."""

    optimizer: torch.optim.Optimizer
    fp32_groups_flat_partition: list[torch.Tensor]
    clip_grad: float
    update_lp_params: Callable[[], None]
    clear_backward_seen_flag: Callable[[], None]
    clear_hp_grads: Callable[[], None]
    clear_lp_grads: Callable[[], None]


class Stage12Optimizer(Protocol):
    """ZeRO-1 and 2."""

    optimizer: torch.optim.Optimizer
    single_partition_of_fp32_groups: list[torch.Tensor]
    averaged_gradients: dict[int, list[torch.Tensor] | None]
    cpu_offload: bool
    get_param_id: Callable[[nn.Parameter], int]
    scaled_global_norm: Callable[[], torch.Tensor]
    update_lp_params: Callable[[], None]
    clear_backward_seen_flag: Callable[[], None]
    zero_grad: Callable[[], None]
    _wait_for_offload_copies: Callable[[], None]


class OffloadedStage12Optimizer(Protocol):
    """What ZeRO-1 and 2 have beside that where the optimizer is offloaded."""

    # By the parameter's number: group, offset in the parameter, offset in the group, elements.
    grad_position: dict[int, tuple[int, int, int, int]]
    accumulated_grads_in_cpu: dict[int, torch.Tensor]


class Stage3Optimizer(Protocol):
    """ZeRO-3. Its groups are its units of swapping, up to `sub_group_size` elements each."""

    optimizer: torch.optim.Optimizer
    parameter_offload: ParameterOffload
    fp32_partitioned_groups_flat: list[torch.Tensor]
    # By the parameter's number: group, offset in the group, elements. Other than ZeRO-2's of the same name.
    grad_position: dict[int, tuple[int, int, int]]
    offload_optimizer: bool
    gradient_accumulation_dtype: torch.dtype
    get_param_id: Callable[[nn.Parameter], int]
    clear_backward_seen_flag: Callable[[], None]
    _get_param_partition_rank: Callable[[nn.Parameter], int]
    # Gives (gradient, group); the second argument asks whether buffers of a disk may go at once.
    _get_fp32_grad_state_partition: Callable[[nn.Parameter, bool], tuple[torch.Tensor, int]]
    _get_norm_groups: Callable[[], list[torch.Tensor]]
    _partition_all_parameters: Callable[[], None]
    # Two leading underscores in DeepSpeed's class, so Python has put its name before them.
    _DeepSpeedZeroOptimizer_Stage3__avg_scatter_grads: Callable[[list[nn.Parameter], torch.dtype], list[torch.Tensor]]
    _swappable_optimizer_subgroup: Callable[[int], bool]
    _optimizer_states_and_gradient_swap_in: Callable[[int], None]
    # Of a group: whether its state, and whether its gradients are to be written.
    _writeback_swap_state: Callable[[int, bool, bool], None]


class DeepSpeedEngine(Protocol):
    """DeepSpeed's engine: its public methods, and its clipping."""

    module: nn.Module
    optimizer: (
        torch.optim.Optimizer | UnfusedOptimizer | Bf16Optimizer | Stage12Optimizer | Stage3Optimizer | ParameterOffload
    )
    device: torch.device
    # By the norm of this engine's own parameters. Only ZeRO-0 in fp32 calls it.
    clip_fp32_gradients: Callable[[], None]
    set_gradient_accumulation_boundary: Callable[[bool], None]
    step: Callable[[], None]
    zero_grad: Callable[[], None]
    train: Callable[[], None]
    eval: Callable[[], None]

    def backward(self, loss: torch.Tensor, *, scale_wrt_gas: bool) -> None: ...


DeepSpeedObject = (
    DeepSpeedEngine
    | torch.optim.Optimizer
    | UnfusedOptimizer
    | Bf16Optimizer
    | Stage12Optimizer
    | Stage3Optimizer
    | ParameterOffload
    | HookHandle
    | nn.Parameter
    | Partition
    | FragmentMapping
    | FragmentAddress
)
"""Whose attributes are checked one by one."""


class CallableEngine(DeepSpeedEngine, Protocol[P, Output_co]):
    """With the module's own forward."""

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Output_co: ...
