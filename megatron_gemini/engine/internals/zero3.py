"""ZeRO-3: every parameter is cut into equal parts, and the optimizer's state into groups that may lie on a disk."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch import nn

from megatron_gemini.engine.internals import gathering, partitioned
from megatron_gemini.engine.internals.fragments import Fragment
from megatron_gemini.engine.internals.release import Use
from megatron_gemini.engine.internals.types import DeepSpeedEngine, PartitionedParameter, Stage3Optimizer
from megatron_gemini.engine.internals.wrapper import OptimizerWrapper


class Stage3Wrapper(OptimizerWrapper):
    """ZeRO-3, with the optimizer on the device, on the host or on an NVMe disk.

    A group is DeepSpeed's unit of swapping, up to `sub_group_size` elements of master weights, moments and gradients.
    At most one of those on the disk is in memory; a group that is small enough never leaves it.
    """

    listed = Stage3Optimizer

    def __init__(self, engine: DeepSpeedEngine) -> None:
        self.optimizer = cast(Stage3Optimizer, engine.optimizer)
        super().__init__(engine, self.optimizer.optimizer)
        self._inside: int | None = None
        self._changed_state = self._changed_gradients = False
        pieces = [self._fragment(name, p) for name, p in self.trained]
        # By group, so that a pass over all of them brings each one in once.
        self.fragments = sorted(pieces, key=lambda piece: piece.group)

    @classmethod
    def uses(cls, engine: DeepSpeedEngine) -> Iterator[Use]:
        yield from super().uses(engine)
        yield from gathering.uses(engine)
        yield from partitioned.uses(engine.module)

    def _fragment(self, name: str, parameter: nn.Parameter) -> Fragment:
        optimizer, weight = self.optimizer, cast(PartitionedParameter, parameter)
        start, count = partitioned.owned_range(weight, optimizer._get_param_partition_rank(parameter))
        group, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]

        def state(key: str | None) -> torch.Tensor:
            # It may be written: checkpoints fill what they are given here.
            self.bring_in(group, state=True)
            flat = optimizer.fp32_partitioned_groups_flat[group]
            return (flat if key is None else self.basic.state[flat][key]).narrow(0, offset, count)

        def gradient() -> torch.Tensor:
            if not optimizer.offload_optimizer:
                return optimizer._get_fp32_grad_state_partition(parameter, False)[0]
            self.bring_in(group)
            flat = optimizer.fp32_partitioned_groups_flat[group].grad
            assert flat is not None, "DeepSpeed makes the offloaded gradients when it builds the optimizer"
            return flat.narrow(0, offset, size)

        shape = tuple(weight.ds_shape)
        return Fragment(name, parameter, shape, start, count, lambda: state(None).data, state, gradient, group)

    def masters(self) -> list[torch.Tensor]:
        # The optimizer below knows of one group while DeepSpeed steps it, and of none between steps.
        return list(self.optimizer.fp32_partitioned_groups_flat)

    @torch.no_grad()
    def publish_masters(self) -> None:
        for fragment in self.fragments:
            # Into the partition: the weight itself is empty while it is not gathered.
            partition = cast(PartitionedParameter, fragment.parameter).ds_tensor
            partition.data.narrow(0, 0, fragment.count).copy_(fragment.master())

    def bring_in(self, group: int, *, state: bool = False, gradients: bool = False) -> None:
        if not self.optimizer._swappable_optimizer_subgroup(group):
            return
        if group != self._inside:
            self.put_back()
            self.optimizer._optimizer_states_and_gradient_swap_in(group)
            self._inside = group
        self._changed_state |= state
        self._changed_gradients |= gradients

    def put_back(self) -> None:
        if self._inside is not None:
            self.optimizer._writeback_swap_state(self._inside, self._changed_state, self._changed_gradients)
        self._inside, self._changed_state, self._changed_gradients = None, False, False

    def keep_accumulating(self) -> None:
        self.optimizer.clear_backward_seen_flag()

    def tell_norm(self, norm: torch.Tensor) -> bool:
        self.optimizer._get_norm_groups = lambda: [norm]
        return True

    def skip(self) -> None:
        """By DeepSpeed's own path for an overflow, whose sign is a norm of -1."""
        self.tell_norm(torch.tensor(-1.0, device=self.engine.device))
        self.engine.step()
