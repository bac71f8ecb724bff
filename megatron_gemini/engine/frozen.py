"""An engine for a module that is not trained: forward only, no gradients, no optimizer."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from megatron_gemini.config.run import RunConfig
from megatron_gemini.engine.groups import EngineGroups, ModelParallelUnit
from megatron_gemini.engine.initial import fill_initial_values
from megatron_gemini.engine.internals import gathering
from megatron_gemini.engine.internals.fragments import Fragment


class FrozenEngine:
    """A module whose weights stay as they begin or were loaded: whole on every rank, or under ZeRO-3 divided.

    Arguments as for `zero.ZeroEngine`. `fragments` and `owned` are there for checkpoints, which hold the weights; their
    masters are the weights themselves, in the computation's dtype, and they have no moments.
    """

    def __init__(
        self,
        build: Callable[[], nn.Module],
        config: RunConfig,
        groups: EngineGroups,
        settings: dict[str, Any],
        device: torch.device,
    ) -> None:
        self.groups, self.stage = groups, settings["zero_optimization"]["stage"]
        self.dtype = torch.bfloat16 if config.engine.precision == "bf16" else torch.float32
        self._unit = ModelParallelUnit(groups) if groups.data_group is not None else None
        self.deepspeed: Any = None
        self.gathers = self.stage == 3
        if self.stage == 3:
            with gathering.within(groups.data_group, self._unit):
                self.deepspeed = self._divided(build, config, settings, device)
        self.module: nn.Module = self._whole(build, config, device) if self.deepspeed is None else self.deepspeed.module
        piece = _divided_piece if self.stage == 3 else _whole_piece
        self.fragments = [
            piece(name, parameter, groups.data_rank) for name, parameter in self.module.named_parameters()
        ]

    def _whole(self, build: Callable[[], nn.Module], config: RunConfig, device: torch.device) -> nn.Module:
        module = build().requires_grad_(False)
        fill_initial_values(module, config.train.seed)
        return module.to(device=device, dtype=self.dtype)

    def _divided(
        self, build: Callable[[], nn.Module], config: RunConfig, settings: dict[str, Any], device: torch.device
    ) -> Any:
        import deepspeed

        gathering.install()
        zero = {key: value for key, value in settings["zero_optimization"].items() if key != "offload_optimizer"}
        if zero.get("offload_param", {}).get("device") == "nvme":
            zero["offload_param"] = {"device": "cpu"}  # so that `fragments` are views of the weights
        settings = {**settings, "zero_optimization": zero}
        with deepspeed.zero.Init(
            data_parallel_group=self.groups.data_group, config_dict_or_path=settings, mpu=self._unit
        ):
            module = build()
        fill_initial_values(module.requires_grad_(False), config.train.seed)
        module.to(device=device, dtype=self.dtype)
        return deepspeed.initialize(model=module, config=settings, mpu=self._unit)[0]

    @torch.no_grad()
    def forward(self, *inputs: Any) -> Any:
        if self.deepspeed is None:
            return self.module(*inputs)
        with gathering.within(self.groups.data_group, self._unit):
            return self.deepspeed(*inputs)

    def evaluating(self) -> contextlib.AbstractContextManager[None]:
        """A frozen module always computes as in evaluation."""
        return contextlib.nullcontext()

    def owned(self) -> list[Fragment]:
        """The pieces that this rank writes into a checkpoint, so that every element is one rank's, once."""
        if self.stage != 3 and self.groups.data_rank != 0:
            return []
        return [fragment for fragment in self.fragments if fragment.count]


def _fragment(name: str, parameter: Any, shape: tuple[int, ...], start: int, flat: torch.Tensor) -> Fragment:
    def no_moment(key: str) -> torch.Tensor:
        raise ValueError(f"{name} is frozen and has no {key}")

    return Fragment(name, parameter, shape, start, len(flat), lambda: flat, no_moment, lambda: None)


def _whole_piece(name: str, parameter: Any, rank: int) -> Fragment:
    return _fragment(name, parameter, tuple(parameter.shape), 0, parameter.data.view(-1))


def _divided_piece(name: str, parameter: Any, rank: int) -> Fragment:
    piece = parameter.ds_tensor
    start = piece.ds_numel * rank
    count = max(0, min(piece.ds_numel, parameter.ds_numel - start))
    return _fragment(name, parameter, tuple(parameter.ds_shape), start, piece.data.narrow(0, 0, count))
