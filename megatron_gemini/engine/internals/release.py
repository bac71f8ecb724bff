"""The release of DeepSpeed that this folder was checked with, and what to say of another that lacks something."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterable
from functools import reduce
from typing import NamedTuple

from megatron_gemini.engine.internals.types import DeepSpeedObject

CHECKED = "0.19"

_PARTITIONING = "deepspeed.runtime.zero.partition_parameters"
MODULES = {
    "deepspeed.runtime.zero.utils": ("assert_ints_same_as_other_ranks",),
    "deepspeed.runtime.zero.stage3": ("assert_ints_same_as_other_ranks",),
    "deepspeed.runtime.zero.partitioned_param_coordinator": ("assert_ints_same_as_other_ranks",),
    _PARTITIONING: (
        "assert_ints_same_as_other_ranks",
        "ZeroParamStatus.AVAILABLE",
        "ZeroParamStatus.NOT_AVAILABLE",
        # The five things that `all_gather_coalesced` may return.
        "AllGatherHandle.wait",
        "AllGatherCoalescedHandle.wait",
        "MultipleAllGatherHandles.wait",
        "NoGatherHandle.wait",
        "NoGatherCoalescedHandle.wait",
    ),
    "deepspeed.utils.groups": ("mpu",),
    "deepspeed.utils.nvtx": ("enable_nvtx",),
}
"""What is used of DeepSpeed's modules, beside the objects of `types`."""


class Use(NamedTuple):
    """An object of DeepSpeed's, and the class of `types` that lists what is used of it."""

    thing: DeepSpeedObject
    listed: type


def members(listed: type) -> list[str]:
    """The attributes and methods that a class of `types` lists, those of the Protocols that it extends included."""
    names: list[str] = []
    for one in listed.__mro__:
        if one.__module__ == listed.__module__:
            names += inspect.get_annotations(one)
            names += [name for name, value in vars(one).items() if inspect.isfunction(value)]
    return [name for name in dict.fromkeys(names) if not name.startswith("__")]


def require(uses: Iterable[Use]) -> None:
    """Raise RuntimeError that names the first thing that the installed DeepSpeed lacks of what is used of it.

    uses: in an order in which each can be found by what the ones before have been found to have. The modules are
        checked in any case.
    """
    for module, names in MODULES.items():
        for name in names:
            try:
                reduce(getattr, name.split("."), importlib.import_module(module))
            except (ImportError, AttributeError) as error:
                raise changed(f"{module}.{name}") from error
    # One at a time: a generator goes on to the next use with what this one has been found to have.
    for thing, listed in uses:
        for name in members(listed):
            if not hasattr(thing, name):
                raise changed(f"{type(thing).__name__}.{name}")


def changed(name: str) -> RuntimeError:
    """An error that says which internal of DeepSpeed this release no longer has."""
    import deepspeed

    return RuntimeError(
        f"deepspeed {deepspeed.__version__} has no {name}, on which this trainer relies; checked with {CHECKED}. "
        "Install that version (constraints.txt)"
    )
