"""ZeRO-0: every rank has everything. In fp32 DeepSpeed leaves torch's optimizer as it is, in bf16 it wraps it."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from megatron_gemini.engine.internals.fragments import Fragment
from megatron_gemini.engine.internals.types import DeepSpeedEngine, UnfusedOptimizer
from megatron_gemini.engine.internals.wrapper import OptimizerWrapper


class PlainWrapper(OptimizerWrapper):
    """ZeRO-0 in fp32, where the weights are their own masters."""

    def __init__(self, engine: DeepSpeedEngine) -> None:
        super().__init__(engine, cast(torch.optim.Optimizer, engine.optimizer))
        self.fragments = [_whole(name, p, p, self.basic) for name, p in self.trained]
        # Here alone the engine clips, and not the wrapper: by the norm of this engine's parameters.
        engine.clip_fp32_gradients = lambda: None


class UnfusedWrapper(OptimizerWrapper):
    """ZeRO-0 in bf16, with float32 copies of the weights. pairs: every weight and its copy."""

    listed = UnfusedOptimizer

    def __init__(self, engine: DeepSpeedEngine) -> None:
        self.optimizer = cast(UnfusedOptimizer, engine.optimizer)
        super().__init__(engine, self.optimizer.optimizer)
        groups = zip(self.optimizer.fp16_groups, self.optimizer.fp32_groups, strict=True)
        self.pairs = [pair for lows, highs in groups for pair in zip(lows, highs, strict=True)]
        # By identity, since `==` of tensors compares their elements.
        masters = {id(low): high for low, high in self.pairs}
        self.fragments = [_whole(name, p, masters[id(p)], self.basic) for name, p in self.trained]
        # Else it clips by a norm of this engine alone.
        self.optimizer.clip_grad = 0.0

    @torch.no_grad()
    def publish_masters(self) -> None:
        for low, high in self.pairs:
            low.data.copy_(high.data)


def _whole(name: str, parameter: nn.Parameter, master: torch.Tensor, basic: torch.optim.Optimizer) -> Fragment:
    """A fragment that is all of its parameter."""
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
