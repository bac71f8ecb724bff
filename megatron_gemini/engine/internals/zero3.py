"""ZeRO-3: every parameter is cut into equal parts, and the optimizer's state into groups that may lie on a disk."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch import nn

from megatron_gemini.engine.internals import gathering, partitioned
from megatron_gemini.engine.internals.fragments import Fragment
from megatron_gemini.engine.internals.release import Use
from megatron_gemini.engine.internals.swapping import SwappedGroups
from megatron_gemini.engine.internals.types import DeepSpeedEngine, PartitionedParameter, Stage3Optimizer
from megatron_gemini.engine.internals.wrapper import OptimizerWrapper


class Stage3Wrapper(OptimizerWrapper):
    """ZeRO-3, with the optimizer on the device, on the host or on a disk."""

    def __init__(self, engine: DeepSpeedEngine) -> None:
        self.optimizer = cast(Stage3Optimizer, engine.optimizer)
        super().__init__(engine, self.optimizer.optimizer)
        self.groups = SwappedGroups(self.optimizer)
        pieces = [self._fragment(name, p) for name, p in self.trained()]
        # By group, so that a pass over all of them brings each one in once.
        self.fragments = sorted(pieces, key=lambda piece: piece.group)

    @classmethod
    def uses(cls, engine: DeepSpeedEngine) -> Iterator[Use]:
        yield from super().uses(engine)
        yield Use(engine.optimizer, Stage3Optimizer)
        yield from gathering.uses(engine)
        yield from partitioned.uses(engine.module)

    def _fragment(self, name: str, parameter: nn.Parameter) -> Fragment:
        optimizer, weight = self.optimizer, cast(PartitionedParameter, parameter)
        start, count = partitioned.owned_range(weight, optimizer._get_param_partition_rank(parameter))
        group, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]

        def state(key: str | None) -> torch.Tensor:
            self.groups.enter(group, changes_state=True)
            flat = optimizer.fp32_partitioned_groups_flat[group]
            return (flat if key is None else self.basic.state[flat][key]).narrow(0, offset, count)

        def gradient() -> torch.Tensor:
            if not optimizer.offload_optimizer:
                return optimizer._get_fp32_grad_state_partition(parameter, False)[0]
            self.groups.enter(group)
            flat = optimizer.fp32_partitioned_groups_flat[group].grad
            assert flat is not None, "DeepSpeed makes the offloaded gradients when it builds the optimizer"
            return flat.narrow(0, offset, size)

        shape = tuple(weight.ds_shape)
        return Fragment(name, parameter, shape, start, count, lambda: state(None).data, state, gradient, group)

    def masters(self) -> list[torch.Tensor]:
        # While DeepSpeed steps a group, the optimizer below knows of that group alone.
        return list(self.optimizer.fp32_partitioned_groups_flat)

    @torch.no_grad()
    def publish_masters(self) -> None:
        for fragment in self.fragments:
            partition = cast(PartitionedParameter, fragment.parameter).ds_tensor
            partition.data.narrow(0, 0, fragment.count).copy_(fragment.master())

    def bring_in(self, group: int) -> None:
        self.groups.enter(group, changes_state=True)

    def keep_changed_gradients(self, group: int) -> None:
        self.groups.enter(group, changes_gradients=True)

    def put_back(self) -> None:
        self.groups.leave()

    def keep_accumulating(self) -> None:
        self.optimizer.clear_backward_seen_flag()

    def tell_norm(self, norm: torch.Tensor) -> bool:
        self.optimizer._get_norm_groups = lambda: [norm]
        return True

    def skip(self) -> None:
        """By DeepSpeed's own path for an overflow, whose sign is a norm of -1."""
        self.tell_norm(torch.tensor(-1.0, device=self.engine.device))
        self.engine.step()
