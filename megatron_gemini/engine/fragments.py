"""The one file that touches the internals of DeepSpeed's optimizers.

ZeRO keeps a rank's piece of every parameter somewhere else at each stage. `fragments` shows them all alike: for
every parameter the range of its tensor-parallel shard that this rank owns, with the float32 master weights, Adam's
moments and the gradient as flat views. Checked with deepspeed 0.19.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from megatron_gemini.engine.gathering import changed
from megatron_gemini.engine.swapping import SwappedGroups

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


_RELIED_ON = {
    1: ("get_param_id", "averaged_gradients", "update_lp_params", "clear_backward_seen_flag"),
    2: ("get_param_id", "averaged_gradients", "update_lp_params", "clear_backward_seen_flag"),
    3: (
        "get_param_id",
        "grad_position",
        "fp32_partitioned_groups_flat",
        "_get_param_partition_rank",
        "_get_fp32_grad_state_partition",
        "_get_norm_groups",
        "_swappable_optimizer_subgroup",
        "clear_backward_seen_flag",
    ),
}


def check(engine: Any) -> None:
    """Raise RuntimeError that names what this release of DeepSpeed no longer has of what is used here."""
    if type(engine.optimizer).__name__ == "BF16_Optimizer":  # which takes the place of ZeRO-1's in bf16
        return
    for name in _RELIED_ON.get(engine.zero_optimization_stage(), ()):
        if not hasattr(engine.optimizer, name):
            raise changed(f"{type(engine.optimizer).__name__}.{name}")


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


def keep_changed_gradients(engine: Any, group: int) -> None:
    """What was written into the gradients of `group` is to be kept, where they lie on disk."""
    groups: SwappedGroups | None = getattr(engine, "swapped_groups", None)
    if groups is not None:
        groups.enter(group, changes_gradients=True)


def put_back(engine: Any) -> None:
    """Write what lies on disk back to it; views of fragments are void from then on."""
    groups: SwappedGroups | None = getattr(engine, "swapped_groups", None)
    if groups is not None:
        groups.leave()


def basic_optimizer(engine: Any) -> torch.optim.Optimizer:
    """The optimizer below DeepSpeed's wrapper."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def _flat_masters(engine: Any) -> list[torch.Tensor]:
    """The tensors that the basic optimizer steps on this rank."""
    optimizer = engine.optimizer
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        return list(optimizer.fp32_partitioned_groups_flat)
    return [p for group in basic_optimizer(engine).param_groups for p in group["params"]]


def ensure_moments(engine: Any) -> None:
    """Make Adam's moments exist (zeros), as a resume needs before it fills them."""
    basic = basic_optimizer(engine)
    groups: SwappedGroups | None = getattr(engine, "swapped_groups", None)
    for number, master in enumerate(_flat_masters(engine)):
        if groups is not None:
            groups.enter(number, changes_state=True)
        for key in MOMENTS:
            if key not in basic.state[master]:
                basic.state[master][key] = torch.zeros_like(master.data)
    put_back(engine)


def set_step_count(engine: Any, steps: int) -> None:
    """Set Adam's count of updates wherever moments exist.

    Some wrappers make the moments by a step on zero gradients when they are built, which counts as one.
    """
    basic = basic_optimizer(engine)
    for master in _flat_masters(engine):
        state = basic.state.get(master)
        if not state:
            continue
        as_tensor = isinstance(basic, torch.optim.AdamW)
        state["step"] = torch.tensor(float(steps), device=master.device) if as_tensor else steps


def has_moments(engine: Any) -> bool:
    """Whether a first step has made Adam's moments."""
    basic = basic_optimizer(engine)
    return all(MOMENTS[0] in basic.state.get(master, {}) for master in _flat_masters(engine))


@torch.no_grad()
def publish_masters(engine: Any) -> None:
    """Copy the master weights into the weights that the forward reads, on every rank."""
    optimizer = engine.optimizer
    if hasattr(optimizer, "update_lp_params"):  # ZeRO-1 and 2
        optimizer.update_lp_params()
    elif hasattr(optimizer, "fp32_partitioned_groups_flat"):  # ZeRO-3
        for fragment in fragments(engine):
            partitioned: Any = fragment.parameter
            partitioned.ds_tensor.data.narrow(0, 0, fragment.count).copy_(fragment.master())
    elif hasattr(optimizer, "fp32_groups"):
        for low_group, high_group in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            for low, high in zip(low_group, high_group, strict=True):
                low.data.copy_(high.data)


def wait_for_gradients(engine: Any) -> None:
    """Block until DeepSpeed's asynchronous reductions and copies to the host have finished."""
    if hasattr(engine.optimizer, "_wait_for_offload_copies"):
        engine.optimizer._wait_for_offload_copies()
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def keep_accumulating(engine: Any) -> None:
    """After a backward: the next one adds to its gradients, also if no forward comes between.

    DeepSpeed counts backwards at the forward that follows; where several forwards come first and then as many
    backwards, as in a pipeline, each backward would otherwise overwrite the gradients of the one before.
    """
    if hasattr(engine.optimizer, "clear_backward_seen_flag"):  # ZeRO-0 has nothing to count
        engine.optimizer.clear_backward_seen_flag()


def clips_itself(engine: Any) -> bool:
    """Whether DeepSpeed's wrapper has a seam through which it can be told the norm to clip by."""
    return hasattr(engine.optimizer, "_get_norm_groups") or hasattr(engine.optimizer, "scaled_global_norm")


def silence_own_clipping(engine: Any) -> None:
    """Where there is no such seam (ZeRO-0, and ZeRO-1 in bf16), stop DeepSpeed from clipping by its own norm."""
    if not clips_itself(engine):
        engine.clip_fp32_gradients = lambda: None
        if hasattr(engine.optimizer, "clip_grad"):
            engine.optimizer.clip_grad = 0.0


def replace_norm(engine: Any, norm: torch.Tensor) -> None:
    """Let the next `engine.step()` clip by `norm` in place of DeepSpeed's own figure; it must be finite."""
    optimizer = engine.optimizer
    if hasattr(optimizer, "_get_norm_groups"):  # ZeRO-3
        optimizer._get_norm_groups = lambda: [norm]
    elif hasattr(optimizer, "scaled_global_norm"):  # ZeRO-1 and 2
        optimizer.scaled_global_norm = lambda norm_type=2: norm


def skip_step(engine: Any) -> None:
    """Drop the gradients of this step, by DeepSpeed's own overflow path where it has one."""
    optimizer = engine.optimizer
    if clips_itself(engine):
        replace_norm(engine, torch.tensor(-1.0, device=engine.device))  # its sign of a non-finite norm
        engine.step()
        _forget_offloaded_gradients(optimizer)
        return
    for name in ("clear_hp_grads", "clear_lp_grads"):
        if hasattr(optimizer, name):
            getattr(optimizer, name)()
    engine.zero_grad()


def _forget_offloaded_gradients(optimizer: Any) -> None:
    """After a skipped step DeepSpeed 0.19 keeps what ZeRO-1 and 2 offloaded, and a NaN would return for ever."""
    if not getattr(optimizer, "cpu_offload", False):
        return
    for key in optimizer.averaged_gradients:
        optimizer.averaged_gradients[key] = None
    for master in optimizer.single_partition_of_fp32_groups:
        master.grad.zero_()
    for gradient in optimizer.accumulated_grads_in_cpu.values():
        gradient.zero_()
    optimizer.zero_grad(set_to_none=True)
