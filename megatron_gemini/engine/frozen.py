"""An engine for a module that is not trained: forward only, no gradients, no optimizer."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch

from megatron_gemini.config.run import RunConfig
from megatron_gemini.engine.groups import EngineGroups
from megatron_gemini.engine.internals.kinds import frozen_uses
from megatron_gemini.engine.internals.partitioned import frozen_fragment
from megatron_gemini.engine.internals.release import require
from megatron_gemini.engine.internals.types import CallableEngine
from megatron_gemini.engine.module_engine import ModuleEngine, Output, P, TypedModule
from megatron_gemini.engine.settings import JsonObject, section, zero_stage


class FrozenEngine(ModuleEngine[P, Output]):
    """A module whose weights stay as they begin or were loaded: whole on every rank, or under ZeRO-3 divided.

    Arguments as for `zero.ZeroEngine`. `fragments` and `owned` are there for checkpoints, which hold the weights. The
    fragments' masters are the weights themselves, in the computation's dtype, and have no moments.
    """

    def __init__(
        self,
        build: Callable[[], TypedModule[P, Output]],
        config: RunConfig,
        groups: EngineGroups,
        settings: JsonObject,
        device: torch.device,
    ) -> None:
        super().__init__(config, groups, zero_stage(settings), device)
        self.divided = self.stage == 3  # ZeRO-1 and 2 divide what is not there
        self.deepspeed: CallableEngine[P, Output] | None = None
        self.gathers, self.keeps = self.stage == 3, False
        settings = without_optimizer(settings)
        with self.alone():
            self.module = self.build(build, settings, trained=False)
            if self.stage == 3:
                import deepspeed

                # Without parameters to train it makes the hooks that gather and release, and no optimizer.
                self.deepspeed, *_ = deepspeed.initialize(model=self.module, config=settings, mpu=self.unit)
                require(frozen_uses(self.deepspeed))
        named = self.module.named_parameters()
        self.fragments = [frozen_fragment(name, parameter, groups.data_rank) for name, parameter in named]

    @torch.no_grad()
    def forward(self, *inputs: P.args, **named: P.kwargs) -> Output:
        if self.deepspeed is None:
            return self.module(*inputs, **named)
        with self.alone():
            return self.deepspeed(*inputs, **named)

    def evaluating(self) -> contextlib.AbstractContextManager[None]:
        """A frozen module always computes as in evaluation."""
        return contextlib.nullcontext()


def without_optimizer(settings: JsonObject) -> JsonObject:
    """DeepSpeed's dictionary for an engine without an optimizer, with weights where `fragments` can be views of them.

    So weights that would lie on a disk lie on the host.
    """
    zero = {key: value for key, value in section(settings, "zero_optimization").items() if key != "offload_optimizer"}
    if section(zero, "offload_param").get("device") == "nvme":
        zero["offload_param"] = {"device": "cpu"}
    return {**settings, "zero_optimization": zero}
