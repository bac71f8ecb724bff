"""ZeRO-1 and 2: flat groups of parameters, which are cut without regard to where a parameter ends."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import nn

from megatron_gemini.engine.internals.fragments import Fragment
from megatron_gemini.engine.internals.release import Use
from megatron_gemini.engine.internals.types import (
    Bf16Optimizer,
    DeepSpeedEngine,
    FragmentAddress,
    FragmentMapping,
    MappedParameter,
    OffloadedStage12Optimizer,
    OwnedParameter,
    Stage12Optimizer,
)
from megatron_gemini.engine.internals.wrapper import OptimizerWrapper


class _Mapped(OptimizerWrapper):
    """What both wrappers of these stages share: a parameter knows what this rank owns of it.

    groups: this rank's part of every flat group, float32.
    """

    optimizer: Bf16Optimizer | Stage12Optimizer

    def __init__(self, engine: DeepSpeedEngine, basic: torch.optim.Optimizer, groups: Sequence[torch.Tensor]) -> None:
        super().__init__(engine, basic)
        self.groups = groups
        self.fragments = [f for name, p in self.trained if (f := self._fragment(name, p)) is not None]

    @classmethod
    def uses(cls, engine: DeepSpeedEngine) -> Iterator[Use]:
        yield from super().uses(engine)
        for parameter in engine.module.parameters():
            if parameter.requires_grad:
                yield Use(parameter, MappedParameter)
                mapping = cast(MappedParameter, parameter)._hp_mapping
                if mapping is not None:
                    yield Use(parameter, OwnedParameter)
                    yield Use(mapping, FragmentMapping)
                    yield Use(mapping.lp_fragment_address, FragmentAddress)
                    yield Use(mapping.hp_fragment_address, FragmentAddress)

    def _fragment(self, name: str, parameter: nn.Parameter) -> Fragment | None:
        """None of a parameter of which this rank owns nothing."""
        mapping = cast(MappedParameter, parameter)._hp_mapping
        if mapping is None:
            return None
        address, where = mapping.lp_fragment_address, mapping.hp_fragment_address
        return Fragment(
            name,
            parameter,
            tuple(parameter.shape),
            address.start,
            address.numel,
            lambda: mapping.hp_fragment.data.view(-1),
            # Not DeepSpeed's own link: it is made after the first group's first step and misses the other groups.
            lambda key: self.basic.state[self.groups[mapping.param_group_index]][key].narrow(
                0, where.start, where.numel
            ),
            lambda: self._gradient(parameter, mapping),
        )

    def _gradient(self, parameter: nn.Parameter, mapping: FragmentMapping) -> torch.Tensor | None:
        address = mapping.lp_fragment_address
        gradient = mapping.get_lp_grad_fragment(cast(OwnedParameter, parameter)._index_in_param_group)
        if gradient is None:
            return None
        flat = gradient.reshape(-1)
        # In bf16, ZeRO-1 keeps the float32 sum of the whole gradient on every rank.
        whole = flat.numel() == parameter.numel() and address.numel != parameter.numel()
        return flat.narrow(0, address.start, address.numel) if whole else flat

    def publish_masters(self) -> None:
        self.optimizer.update_lp_params()

    def keep_accumulating(self) -> None:
        self.optimizer.clear_backward_seen_flag()


class Bf16Wrapper(_Mapped):
    """ZeRO-1 in bf16 where nothing is offloaded."""

    listed = Bf16Optimizer
    optimizer: Bf16Optimizer

    def __init__(self, engine: DeepSpeedEngine) -> None:
        self.optimizer = cast(Bf16Optimizer, engine.optimizer)
        super().__init__(engine, self.optimizer.optimizer, self.optimizer.fp32_groups_flat_partition)
        # Else it clips by a norm of this engine alone.
        self.optimizer.clip_grad = 0.0

    def skip(self) -> None:
        # The float32 sums, which a later step would else add to.
        self.optimizer.clear_hp_grads()
        self.optimizer.clear_lp_grads()
        self.engine.zero_grad()


class Stage12Wrapper(_Mapped):
    """ZeRO-1 in fp32 or with an offloaded optimizer, and ZeRO-2."""

    listed = Stage12Optimizer
    optimizer: Stage12Optimizer

    def __init__(self, engine: DeepSpeedEngine) -> None:
        self.optimizer = cast(Stage12Optimizer, engine.optimizer)
        self.offloaded = cast(OffloadedStage12Optimizer, engine.optimizer) if self.optimizer.cpu_offload else None
        super().__init__(engine, self.optimizer.optimizer, self.optimizer.single_partition_of_fp32_groups)

    @classmethod
    def uses(cls, engine: DeepSpeedEngine) -> Iterator[Use]:
        yield from super().uses(engine)
        if cast(Stage12Optimizer, engine.optimizer).cpu_offload:
            yield Use(engine.optimizer, OffloadedStage12Optimizer)

    def _gradient(self, parameter: nn.Parameter, mapping: FragmentMapping) -> torch.Tensor | None:
        if self.offloaded is None:
            return super()._gradient(parameter, mapping)
        # On the host the gradients of a group are one tensor, of which a parameter's number tells the place.
        group, _, offset, count = self.offloaded.grad_position[self.optimizer.get_param_id(parameter)]
        gradient = self.groups[group].grad
        assert gradient is not None, "DeepSpeed makes the offloaded gradients when it builds the optimizer"
        return gradient.narrow(0, offset, count)

    def wait(self) -> None:
        self.optimizer._wait_for_offload_copies()
        super().wait()

    def tell_norm(self, norm: torch.Tensor) -> bool:
        self.optimizer.scaled_global_norm = lambda: norm
        return True

    def skip(self) -> None:
        """By DeepSpeed's own path for an overflow, whose sign is a norm of -1."""
        self.tell_norm(torch.tensor(-1.0, device=self.engine.device))
        self.engine.step()
        if self.offloaded is None:
            return
        # DeepSpeed 0.19 keeps what it offloaded after a skipped step, and a NaN would return at every later one.
        for key in self.optimizer.averaged_gradients:
            self.optimizer.averaged_gradients[key] = None
        for gradient in (*(m.grad for m in self.groups), *self.offloaded.accumulated_grads_in_cpu.values()):
            if gradient is not None:
                gradient.zero_()
        self.optimizer.zero_grad()
