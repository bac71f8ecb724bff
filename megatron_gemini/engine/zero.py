"""One DeepSpeed engine over one module that is trained: a pipeline stage, an encoder, or a whole model."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import nn

from megatron_gemini.config.run import RunConfig
from megatron_gemini.engine.groups import EngineGroups
from megatron_gemini.engine.internals import gathering
from megatron_gemini.engine.internals.kinds import wrapper_of
from megatron_gemini.engine.internals.types import CallableEngine
from megatron_gemini.engine.module_engine import ModuleEngine, Output, P, TypedModule
from megatron_gemini.engine.norm import clip_gradients
from megatron_gemini.engine.optimizer import build_optimizer, parameter_groups
from megatron_gemini.engine.settings import JsonObject, most_kept, section, size_swap_buffers, zero_stage


class ZeroEngine(ModuleEngine[P, Output]):
    """A module divided by ZeRO over the data ranks of `groups`, its gradients and its optimizer.

    build: makes the module on this rank (its tensor-parallel shard of its stage), values not yet set, with the
        parameters' global names. settings: DeepSpeed's dictionary, see `deepspeed_config`. lr_scales: the learning rate
        of parameters whose names begin so, as a multiple of that of a step.
    Raises RuntimeError that names what the installed DeepSpeed lacks of what is used of it.
    """

    deepspeed: CallableEngine[P, Output]

    def __init__(
        self,
        build: Callable[[], TypedModule[P, Output]],
        config: RunConfig,
        groups: EngineGroups,
        settings: JsonObject,
        device: torch.device,
        lr_scales: Mapping[str, float] | None = None,
    ) -> None:
        import deepspeed

        super().__init__(config, groups, zero_stage(settings), device)
        self.divided = self.stage > 0
        settings = sized(settings, build)
        with self.alone():
            self.module = self.build(build, settings, trained=True)
            named, decay = self.module.named_parameters(), config.optimizer.weight_decay
            parameters = parameter_groups(named, decay, lr_scales or {})
            optimizer = build_optimizer(parameters, config, device.type == "cuda")
            self.deepspeed, *_ = deepspeed.initialize(
                model=self.module, optimizer=optimizer, model_parameters=parameters, config=settings, mpu=self.unit
            )
        self.wrapper = wrapper_of(self.deepspeed)
        # Some wrappers step once on zero gradients while they are built, which would count in Adam's bias correction.
        self.wrapper.set_step_count(0)
        self.fragments = self.wrapper.fragments
        # One rank alone has all weights whole, unless they lie elsewhere.
        one_piece = groups.data_size == 1 and config.engine.offload_parameters == "none"
        self.gathers = self.stage == 3 and not one_piece
        whole = sum(math.prod(fragment.shard_shape) for fragment in self.fragments)
        self.keeps = self.gathers and whole <= most_kept(settings)
        if self.stage == 3 and one_piece:
            gathering.keep_whole(self.deepspeed)

    @property
    def optimizer_name(self) -> str:
        """The optimizer's class, the ZeRO stage that divides it, and where its state lies."""
        offload = self.config.engine.offload_optimizer
        where = f", state offloaded to {offload}" if offload != "none" else ""
        return f"{type(self.wrapper.basic).__name__}, ZeRO-{self.stage}{where}"

    def forward(self, *inputs: P.args, **named: P.kwargs) -> Output:
        with self.alone():
            return self.deepspeed(*inputs, **named)

    def backward(self, loss: torch.Tensor, boundary: bool) -> None:
        """Adds the gradients of `loss`, a scalar; boundary: it is the step's last one, after which they are reduced."""
        with self.alone():
            # Before the backward: hooks reduce gradients as they come, and ask whether these are the last.
            self.deepspeed.set_gradient_accumulation_boundary(boundary)
            # The loss has been divided by the whole step's weight; DeepSpeed would divide it by the microbatches.
            self.deepspeed.backward(loss, scale_wrt_gas=False)
            self.wrapper.keep_accumulating()

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        self.deepspeed.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.deepspeed.train()

    def wait(self) -> None:
        """Until DeepSpeed's asynchronous reductions and copies to the host have finished."""
        self.wrapper.wait()

    def step(self, lr: float, norm: torch.Tensor) -> None:
        """Clip by `norm`, the global one, and update; a norm that is not finite drops the gradients instead."""
        with self.alone():
            # DeepSpeed brings groups in by itself from here on, and must find them where it left them.
            self.wrapper.put_back()
            if not torch.isfinite(norm):
                self.wrapper.skip()
                return
            for group in self.wrapper.basic.param_groups:
                group["lr"] = lr * group["lr_scale"]
            if not self.wrapper.tell_norm(norm):
                clip_gradients(self.fragments, norm, self.config.engine.gradient_clipping)
            self.deepspeed.step()


def sized(settings: JsonObject, build: Callable[[], TypedModule[P, Output]]) -> JsonObject:
    """A copy of DeepSpeed's dictionary, with swap buffers that fit what `build` makes."""
    settings = copy.deepcopy(settings)
    if section(settings, "zero_optimization", "offload_param").get("device") == "nvme":
        # Made for its sizes, without memory: DeepSpeed takes its buffers before the module itself is there.
        with torch.device("meta"):
            module = build()
        assert isinstance(module, nn.Module)
        size_swap_buffers(settings, max((parameter.numel() for parameter in module.parameters()), default=1))
    return settings
