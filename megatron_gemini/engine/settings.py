"""DeepSpeed's dictionary: its type, what is read of it, and how one engine's becomes another's."""

from __future__ import annotations

import copy
import dataclasses
from typing import TypeAlias

from megatron_gemini.config.engine import EngineConfig

LIVE = 300_000_000
"""Elements of weights that ZeRO-3 leaves gathered between uses, where a user's JSON does not say fewer."""

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"
JsonObject: TypeAlias = dict[str, Json]

_KEPT = ("stage3_max_live_parameters", "stage3_max_reuse_distance")
# There once a run: the policy's engine has them.
_ONCE = ("tensorboard", "wandb", "csv_monitor", "comet", "flops_profiler", "comms_logger")


def section(settings: JsonObject, *keys: str) -> JsonObject:
    """The object below `keys`, itself and not a copy; an empty one where there is none.

    Raises ValueError that names the key where something else is there.
    """
    for number, key in enumerate(keys):
        below = settings.get(key, {})
        if not isinstance(below, dict):
            raise ValueError(f"DeepSpeed's {'.'.join(keys[: number + 1])} is {below!r}; it must be an object")
        settings = below
    return settings


def zero_stage(settings: JsonObject) -> int:
    """The ZeRO stage of an engine with these settings."""
    stage = section(settings, "zero_optimization")["stage"]
    assert isinstance(stage, int), stage
    return stage


def size_swap_buffers(settings: JsonObject, largest: int) -> None:
    """Give weights on NVMe buffers of the `largest` parameter, in elements; DeepSpeed's own take 2 GB an engine."""
    offload = section(settings, "zero_optimization", "offload_param")
    if offload.get("device") == "nvme":
        # In whole blocks: DeepSpeed's asynchronous IO moves 1,024 bytes, or a multiple of that, at a time.
        offload.setdefault("buffer_size", -(-largest // 1024) * 1024)


def most_kept(settings: JsonObject) -> int:
    """The largest number of parameters that an engine leaves gathered from a step's first use to its last.

    DeepSpeed itself leaves as many between a forward and its backward. None where the weights lie elsewhere, which is
    asked for to save memory.
    """
    if "offload_param" in section(settings, "zero_optimization"):
        return 0
    given = [section(settings, "zero_optimization").get(key) for key in _KEPT]
    return min([LIVE, *(int(value) for value in given if isinstance(value, int | float))])


def at_stage(engine: EngineConfig, stage: int) -> EngineConfig:
    """The engine section with another ZeRO stage, and without the offloading that the stage cannot have."""
    # ZeRO-0 divides no optimizer that could be moved, and only ZeRO-3 has weights to bring in one at a time.
    optimizer = engine.offload_optimizer if stage > 0 else "none"
    parameters = engine.offload_parameters if stage == 3 else "none"
    # DeepSpeed's CPU Adam is there for an optimizer that is offloaded.
    adam = "auto" if optimizer == "none" and engine.adam == "deepspeed" else engine.adam
    return dataclasses.replace(
        engine, zero_stage=stage, offload_optimizer=optimizer, offload_parameters=parameters, adam=adam
    )


def second_engine(settings: JsonObject, engine: EngineConfig) -> JsonObject:
    """The settings of one engine for another with the ZeRO stage and the offloads of `engine`.

    What a user has set beside that holds for both, but for monitors and profilers, so that each is there once.
    """
    settings = {key: value for key, value in copy.deepcopy(settings).items() if key not in _ONCE}
    zero = section(settings, "zero_optimization")
    zero["stage"] = engine.zero_stage
    for key, device in (("offload_optimizer", engine.offload_optimizer), ("offload_param", engine.offload_parameters)):
        if device == "none":
            zero.pop(key, None)
    if engine.zero_stage == 3:
        # As `deepspeed_config` has it, but for a decoder at another stage, whose dictionary is without it.
        zero.setdefault("stage3_param_persistence_threshold", 0)
    if engine.precision == "bf16" and engine.zero_stage:
        settings.setdefault("data_types", {"grad_accum_dtype": "fp32"})
    else:  # ZeRO-0 has no float32 sums: DeepSpeed adds up its gradients in the weights' own precision
        settings.pop("data_types", None)
    return settings
