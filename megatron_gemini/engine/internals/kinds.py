"""Which wrapper DeepSpeed has made: it depends on the ZeRO stage, the precision and the offload."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from megatron_gemini.engine.internals import gathering, partitioned
from megatron_gemini.engine.internals.release import Use, changed, require
from megatron_gemini.engine.internals.types import DeepSpeedEngine
from megatron_gemini.engine.internals.wrapper import OptimizerWrapper
from megatron_gemini.engine.internals.zero0 import PlainWrapper, UnfusedWrapper
from megatron_gemini.engine.internals.zero3 import Stage3Wrapper
from megatron_gemini.engine.internals.zero12 import Bf16Wrapper, Stage12Wrapper

KINDS: dict[str, type[UnfusedWrapper | Bf16Wrapper | Stage12Wrapper | Stage3Wrapper]] = {
    "FP16_UnfusedOptimizer": UnfusedWrapper,
    "BF16_Optimizer": Bf16Wrapper,
    "DeepSpeedZeroOptimizer": Stage12Wrapper,
    "DeepSpeedZeroOptimizer_Stage3": Stage3Wrapper,
}
"""By the name of DeepSpeed's class."""


def wrapper_of(engine: DeepSpeedEngine) -> OptimizerWrapper:
    """The wrapper of an engine, after the check that DeepSpeed has everything that will be used of it.

    Raises RuntimeError that names what this release of DeepSpeed no longer has.
    """
    require([Use(engine, DeepSpeedEngine)])
    kind: type[PlainWrapper | UnfusedWrapper | Bf16Wrapper | Stage12Wrapper | Stage3Wrapper] | None = PlainWrapper
    if not isinstance(engine.optimizer, torch.optim.Optimizer):
        kind = KINDS.get(type(engine.optimizer).__name__)
    if kind is None:
        raise changed(f"optimizer that is known here, but a {type(engine.optimizer).__name__}")
    require(kind.uses(engine))
    return kind(engine)


def frozen_uses(engine: DeepSpeedEngine) -> Iterator[Use]:
    """What is touched of a ZeRO-3 engine without an optimizer, which has no wrapper."""
    yield Use(engine, DeepSpeedEngine)
    yield from gathering.uses(engine)
    yield from partitioned.uses(engine.module)
