"""One DeepSpeed engine over one module: a pipeline stage, the encoders, or a whole model."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from megatron_gemini.config.run import RunConfig
from megatron_gemini.engine.deepspeed_config import size_swap_buffers
from megatron_gemini.engine.groups import EngineGroups, ModelParallelUnit
from megatron_gemini.engine.initial import fill_initial_values
from megatron_gemini.engine.internals import gathering, release, state, stepping
from megatron_gemini.engine.internals.fragments import Fragment, fragments
from megatron_gemini.engine.internals.swapping import put_back
from megatron_gemini.engine.norm import clip_gradients
from megatron_gemini.engine.optimizer import LR_SCALE, build_optimizer, parameter_groups
from megatron_gemini.parallel.parameters import placement_of


class ZeroEngine:
    """A module divided by ZeRO over the data ranks of `groups`, its gradients and its optimizer.

    build: makes the module on this rank (its tensor-parallel shard of its stage), values not yet set, with the
        parameters' global names. settings: DeepSpeed's dictionary, see `deepspeed_config`. stage: ZeRO's. lr_scales:
        the learning rate of parameters whose names begin so, as a multiple of that of a step.
    """

    def __init__(
        self,
        build: Callable[[], nn.Module],
        config: RunConfig,
        groups: EngineGroups,
        settings: dict[str, Any],
        device: torch.device,
        lr_scales: Mapping[str, float] | None = None,
    ) -> None:
        import deepspeed

        gathering.install()
        settings = sized(settings, build)
        self.config, self.groups, self.device = config, groups, device
        self.stage: int = settings["zero_optimization"]["stage"]
        self._unit = unit = ModelParallelUnit(groups) if groups.data_group is not None else None
        context: Any = contextlib.nullcontext()
        if self.stage == 3:
            # No dtype argument: on a CPU, DeepSpeed takes bf16 whatever it says. It follows `settings` instead.
            context = deepspeed.zero.Init(data_parallel_group=groups.data_group, config_dict_or_path=settings, mpu=unit)
        with self._alone():
            with context:
                module = build()
            fill_initial_values(module, config.train.seed)
            module.to(device=device, dtype=self.dtype)
            parameters = parameter_groups(module.named_parameters(), config.optimizer.weight_decay, lr_scales or {})
            optimizer = build_optimizer(parameters, config, device.type == "cuda")
            self.deepspeed, *_ = deepspeed.initialize(
                model=module, optimizer=optimizer, model_parameters=parameters, config=settings, mpu=unit
            )
        one_piece = groups.data_size == 1 and config.engine.offload_parameters == "none"
        self.gathers = self.stage == 3 and not one_piece
        """Whether weights are gathered before use: one rank alone has them whole, unless they lie elsewhere."""
        if self.stage == 3 and one_piece:
            gathering.keep_whole(self.deepspeed)
        release.check(self.deepspeed)
        stepping.silence_own_clipping(self.deepspeed)
        state.set_step_count(self.deepspeed, 0)
        self.fragments = fragments(self.deepspeed)

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.config.engine.precision == "bf16" else torch.float32

    @property
    def module(self) -> nn.Module:
        return self.deepspeed.module

    @property
    def optimizer_name(self) -> str:
        """The optimizer's class, the ZeRO stage that divides it, and where its state lies."""
        offload = self.config.engine.offload_optimizer
        where = f", state offloaded to {offload}" if offload != "none" else ""
        return f"{state.basic_optimizer(self.deepspeed).__class__.__name__}, ZeRO-{self.stage}{where}"

    def _alone(self) -> contextlib.AbstractContextManager[None]:
        """Inside, DeepSpeed sees the groups of this engine and no other's."""
        return gathering.within(self.groups.data_group, self._unit)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        with self._alone():
            return self.deepspeed(*inputs, **named)

    def backward(self, loss: torch.Tensor, boundary: bool) -> None:
        """Adds the gradients of `loss`, a scalar; boundary: it is the step's last one, after which they are reduced."""
        with self._alone():
            self.deepspeed.set_gradient_accumulation_boundary(boundary)
            self.deepspeed.backward(loss, scale_wrt_gas=False)
            stepping.keep_accumulating(self.deepspeed)

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Forward only, without a graph."""
        self.deepspeed.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.deepspeed.train()

    def owned(self) -> list[Fragment]:
        """The pieces that this rank answers for, so that every element of the model is one rank's, once.

        A shard is its holder's; of a replicated parameter, the first model rank's; of a tied one, the original's.
        """
        if self.stage == 0 and self.groups.data_rank != 0:
            return []
        return [fragment for fragment in self.fragments if fragment.count and self._answers_for(fragment)]

    def _answers_for(self, fragment: Fragment) -> bool:
        placement = placement_of(fragment.parameter)
        return not placement.copy and (placement.sharded_dim is not None or self.groups.model_rank == 0)

    def wait(self) -> None:
        """Until DeepSpeed's asynchronous reductions and copies to the host have finished."""
        stepping.wait_for_gradients(self.deepspeed)

    def step(self, lr: float, norm: torch.Tensor) -> None:
        """Clip by `norm`, the global one, and update; a norm that is not finite drops the gradients instead."""
        with self._alone():
            put_back(self.deepspeed)
            if not torch.isfinite(norm):
                stepping.skip_step(self.deepspeed)
                return
            for group in self.deepspeed.optimizer.param_groups:
                group["lr"] = lr * group[LR_SCALE]
            if stepping.clips_itself(self.deepspeed):
                stepping.replace_norm(self.deepspeed, norm)
            else:
                clip_gradients(self.fragments, norm, self.config.engine.gradient_clipping)
            self.deepspeed.step()


def sized(settings: dict[str, Any], build: Callable[[], nn.Module]) -> dict[str, Any]:
    """A copy of DeepSpeed's dictionary, with swap buffers that fit what `build` makes."""
    settings = copy.deepcopy(settings)
    if settings["zero_optimization"].get("offload_param", {}).get("device") == "nvme":
        with torch.device("meta"):
            largest = max((parameter.numel() for parameter in build().parameters()), default=1)
        size_swap_buffers(settings, largest)
    return settings
