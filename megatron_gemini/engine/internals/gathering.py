"""The internals of ZeRO-3's gathering of weights.

Two things of DeepSpeed's are changed here. Its checks that all ranks gather the same parameters in the same order
compare with rank 0 of the world, which holds another pipeline stage; here they compare within the engine's own data
ranks. And the weights of a stage can be held over several microbatches, so that they are gathered once.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from megatron_gemini.engine.internals.release import changed

_CHECK = "assert_ints_same_as_other_ranks"
_REDUCE = "_DeepSpeedZeroOptimizer_Stage3__avg_scatter_grads"
_HOLD = -1  # stands in a parameter's set of modules that use it, where DeepSpeed has the modules' numbers from 0

_group: list[ProcessGroup | None] = [None]


@contextlib.contextmanager
def within(group: ProcessGroup | None, unit: Any = None) -> Iterator[None]:
    """DeepSpeed's consistency checks compare the ranks of `group` inside; None: there is no other rank.

    unit: the engine's mpu. DeepSpeed keeps that of the engine created last in a global variable, by which ZeRO-0 would
    average every engine's gradients; inside, it is this one.
    """
    from deepspeed.utils import groups

    _group.append(group)
    before, groups.mpu = groups.mpu, unit
    try:
        yield
    finally:
        groups.mpu = before
        _group.pop()


def install() -> None:
    """Put `same_on_all_ranks` in the place of DeepSpeed's check, in every module that has imported it.

    Raises RuntimeError that names what is missing, where a release of DeepSpeed no longer has it.
    """
    from deepspeed.runtime.zero import partition_parameters, partitioned_param_coordinator, stage3

    for module in (partition_parameters, partitioned_param_coordinator, stage3):
        if not hasattr(module, _CHECK):
            raise changed(f"{module.__name__}.{_CHECK}")
        setattr(module, _CHECK, same_on_all_ranks)


def same_on_all_ranks(numbers: Sequence[int]) -> None:
    """Raise RuntimeError that names the ranks of the current group whose `numbers` differ from their first rank's.

    DeepSpeed numbers parameters in the order in which a process makes them, over all its engines, so that ranks with
    other
    stages begin elsewhere: only the differences from the first number are compared.
    """
    group = _group[-1]
    if group is None or group.size() == 1:
        return
    relative = [number - numbers[0] for number in numbers]
    digest = torch.tensor([len(relative), zlib.crc32(repr(relative).encode())], device=_device(group))
    gathered = [torch.empty_like(digest) for _ in range(group.size())]
    dist.all_gather(gathered, digest, group=group)
    others = [rank for rank, theirs in enumerate(gathered) if not torch.equal(theirs, gathered[0])]
    if others:
        ranks = dist.get_process_group_ranks(group)
        lengths = sorted({int(theirs[0]) for theirs in gathered})
        raise RuntimeError(
            f"ranks {[ranks[rank] for rank in others]} use other modules, or in another order, than rank {ranks[0]} "
            f"({' and '.join(map(str, lengths))} of them); under ZeRO-3 all data-parallel ranks must run the same ones"
        )


def _device(group: ProcessGroup) -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if group.name() == "nccl" else torch.device("cpu")


def hold(engine: Any) -> None:
    """Gather all weights of a ZeRO-3 engine, in one go, and keep them until `release`.

    Meanwhile its modules run without DeepSpeed's hooks, which would find nothing to do. A backward of what was computed
    now has to be held as well.
    """
    parameters = list(engine.module.parameters())
    missing = [p for p in parameters if p.ds_status == _status().NOT_AVAILABLE]
    for parameter in parameters:
        if not hasattr(parameter, "ds_active_sub_modules"):
            raise changed("parameter.ds_active_sub_modules")
        parameter.ds_active_sub_modules.add(_HOLD)
    if missing:
        missing[0].all_gather_coalesced(missing).wait()
    engine.held_hooks = [(handle.hooks_dict_ref(), handle.id) for handle in _hooks(engine)]
    engine.held_hooks = [(hooks, number, hooks.pop(number)) for hooks, number in engine.held_hooks if number in hooks]


def release(engine: Any) -> None:
    """End `hold`: the weights are partitioned again, and the hooks are back."""
    for hooks, number, hook in engine.held_hooks:
        hooks[number] = hook
    for parameter in engine.module.parameters():
        parameter.ds_active_sub_modules.discard(_HOLD)
        if parameter.ds_status == _status().AVAILABLE and not parameter.ds_active_sub_modules:
            parameter.partition()


def keep_whole(engine: Any) -> None:
    """For a ZeRO-3 engine of one data rank, whose part of every weight is the whole: gather and partition nothing.

    A weight and its one partition are then the same memory, which the optimizer updates, and its gradient needs no
    reduction.
    """
    optimizer = engine.optimizer
    for name in ("_partition_all_parameters", _REDUCE):
        if not hasattr(optimizer, name):
            raise changed(f"DeepSpeedZeroOptimizer_Stage3.{name}")
    hold(engine)
    optimizer._partition_all_parameters = lambda: None
    kept = optimizer.gradient_accumulation_dtype
    setattr(optimizer, _REDUCE, lambda parameters, _: [p.grad.view(-1).to(kept) for p in parameters])


def _status() -> Any:
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    return ZeroParamStatus


def _hooks(engine: Any) -> list[Any]:
    """Handles of the hooks that gather and release, in the order in which they were registered."""
    optimizer: Any = engine.optimizer  # of an engine without one, this is the offload itself
    offload: Any = getattr(optimizer, "parameter_offload", optimizer)
    if not hasattr(offload, "fwd_pre_hook"):
        raise changed("DeepSpeedZeRoOffload.fwd_pre_hook")
    return [offload.fwd_pre_hook, *offload.forward_hooks, *offload.backward_hooks]
