"""The internals of ZeRO-3's gathering of weights.

Two things of DeepSpeed's are changed here. Its checks that all ranks gather the same parameters in the same order
compare with rank 0 of the world, which holds another pipeline stage; here they compare within the engine's own data
ranks. And the weights of a stage can be held over several microbatches, so that they are gathered once.
"""

from __future__ import annotations

import contextlib
import importlib
import zlib
from collections.abc import Iterator, Sequence
from typing import cast
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from megatron_gemini.engine.groups import ModelParallelUnit
from megatron_gemini.engine.internals.release import MODULES, Use, require
from megatron_gemini.engine.internals.types import (
    DeepSpeedEngine,
    Hook,
    HookHandle,
    ParameterOffload,
    ParameterStatus,
    PartitionedParameter,
    Stage3Optimizer,
)

_CHECK = "assert_ints_same_as_other_ranks"
# Where DeepSpeed defines its check. Three other modules import it by name, so this one is never patched.
_UTILITIES = "deepspeed.runtime.zero.utils"
# Stands in a parameter's set of modules that use it, where DeepSpeed has the modules' numbers from 0 on.
_HOLD = -1

_scopes: list[ProcessGroup | None] = []
"""The groups of our engines that act now, the innermost last; empty while none of them does."""
_held: WeakKeyDictionary[DeepSpeedEngine, list[tuple[dict[int, Hook], int, Hook]]] = WeakKeyDictionary()
"""Of every engine whose weights are held: the hooks that are left out meanwhile, and where they belong."""


@contextlib.contextmanager
def within(group: ProcessGroup | None, unit: ModelParallelUnit | None = None) -> Iterator[None]:
    """DeepSpeed's consistency checks compare the ranks of `group` inside; None: there is no other rank.

    unit: the engine's mpu. DeepSpeed keeps that of the engine created last in a global variable, by which ZeRO-0 would
    average every engine's gradients; inside, it is this one.
    """
    from deepspeed.utils import groups

    _scopes.append(group)
    # With tensor parallelism 2, ZeRO-0 with the wrong one was off by 3e-6 in the norm and 1e-3 in the loss of step 10.
    before, groups.mpu = groups.mpu, unit
    try:
        yield
    finally:
        groups.mpu = before
        _scopes.pop()


def install() -> None:
    """Put `same_on_all_ranks` in the place of DeepSpeed's check, in every module that has imported it.

    For the whole process, since DeepSpeed looks it up in its modules; outside `within` it is as before.
    Raises RuntimeError that names what is missing, where a release of DeepSpeed no longer has it.
    """
    require(())
    for module, names in MODULES.items():
        if _CHECK in names and module != _UTILITIES:
            setattr(importlib.import_module(module), _CHECK, same_on_all_ranks)


def same_on_all_ranks(numbers: Sequence[int]) -> None:
    """Raise RuntimeError that names the ranks of the current group whose `numbers` differ from their first rank's.

    DeepSpeed numbers parameters in the order in which a process makes them, over all its engines, so that ranks with
    other stages begin elsewhere: only the differences from the first number are compared.
    Outside `within` the caller is another engine than ours, which gets DeepSpeed's own check.
    """
    if not _scopes:
        getattr(importlib.import_module(_UTILITIES), _CHECK)(numbers)
        return
    group = _scopes[-1]
    if group is None or group.size() == 1:
        return
    relative = [number - numbers[0] for number in numbers]
    # A digest, since the lists of ranks that differ may not be as long. NCCL carries nothing but the GPU's tensors.
    device = torch.device("cuda", torch.cuda.current_device()) if group.name() == "nccl" else torch.device("cpu")
    digest = torch.tensor([len(relative), zlib.crc32(repr(relative).encode())], device=device)
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


def uses(engine: DeepSpeedEngine) -> Iterator[Use]:
    """What is touched here of a ZeRO-3 engine, beside its parameters."""
    # An engine without an optimizer has the offload in its place.
    yield Use(getattr(engine.optimizer, "parameter_offload", engine.optimizer), ParameterOffload)
    yield from (Use(handle, HookHandle) for handle in _handles(engine))


def hold(engine: DeepSpeedEngine) -> None:
    """Gather all weights of a ZeRO-3 engine, in one go, and keep them until `release`.

    Meanwhile its modules run without DeepSpeed's hooks, which would find nothing to do. A backward of what was computed
    now has to be held as well.
    """
    parameters = _parameters(engine)
    missing = [p for p in parameters if p.ds_status == _status().NOT_AVAILABLE]
    # Else DeepSpeed would partition a weight after the first module that has used it.
    for parameter in parameters:
        parameter.ds_active_sub_modules.add(_HOLD)
    if missing:
        missing[0].all_gather_coalesced(missing).wait()
    hooks = [(handle.hooks_dict_ref(), handle.id) for handle in _handles(engine)]
    _held[engine] = [(registered, n, registered.pop(n)) for registered, n in hooks if n in registered]


def release(engine: DeepSpeedEngine) -> None:
    """End `hold`: the weights are partitioned again, and the hooks are back."""
    # Dictionaries run hooks in the order of insertion, so they go back in the order in which DeepSpeed made them.
    for registered, number, hook in _held.pop(engine):
        registered[number] = hook
    for parameter in _parameters(engine):
        parameter.ds_active_sub_modules.discard(_HOLD)
        if parameter.ds_status == _status().AVAILABLE and not parameter.ds_active_sub_modules:
            parameter.partition()


def keep_whole(engine: DeepSpeedEngine) -> None:
    """For a ZeRO-3 engine of one data rank, whose part of every weight is the whole: gather and partition nothing.

    A weight and its one partition are then the same memory, which the optimizer updates, and its gradient needs no
    reduction. With layers of width 64, a step took 1.8 times plain torch's, and 2.2 times when it partitioned.
    """
    hold(engine)
    optimizer = cast(Stage3Optimizer, engine.optimizer)
    kept = optimizer.gradient_accumulation_dtype
    optimizer._partition_all_parameters = lambda: None
    optimizer._DeepSpeedZeroOptimizer_Stage3__avg_scatter_grads = lambda parameters, _: [
        cast(torch.Tensor, p.grad).view(-1).to(kept) for p in parameters
    ]


def _parameters(engine: DeepSpeedEngine) -> list[PartitionedParameter]:
    return cast(list[PartitionedParameter], list(engine.module.parameters()))


def _status() -> type[ParameterStatus]:
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    return ZeroParamStatus


def _handles(engine: DeepSpeedEngine) -> list[HookHandle]:
    """Of the hooks that gather and release, in the order in which they were registered."""
    offload = cast(ParameterOffload, getattr(engine.optimizer, "parameter_offload", engine.optimizer))
    return [offload.fwd_pre_hook, *offload.forward_hooks, *offload.backward_hooks]
