"""Optimizer groups that ZeRO-3 keeps on an NVMe disk, brought into memory one at a time.

A group is DeepSpeed's unit of swapping: up to `sub_group_size` elements of master weights, their moments and gradients.
"""

from __future__ import annotations

from megatron_gemini.engine.internals.types import Stage3Optimizer


class SwappedGroups:
    """The groups of one optimizer, at most one of them in memory; a group that is small enough never leaves it."""

    def __init__(self, optimizer: Stage3Optimizer) -> None:
        self._optimizer = optimizer
        self._inside: int | None = None
        self._changed_state = self._changed_gradients = False

    def enter(self, group: int, *, changes_state: bool = False, changes_gradients: bool = False) -> None:
        """Bring a group in, and the one before out. changes_...: what the caller may write, to be kept."""
        if not self._optimizer._swappable_optimizer_subgroup(group):
            return
        if group != self._inside:
            self.leave()
            self._optimizer._optimizer_states_and_gradient_swap_in(group)
            self._inside = group
        self._changed_state |= changes_state
        self._changed_gradients |= changes_gradients

    def leave(self) -> None:
        """Take the group out, with what has changed; views of it are void from then on."""
        if self._inside is not None:
            self._optimizer._writeback_swap_state(self._inside, self._changed_state, self._changed_gradients)
        self._inside, self._changed_state, self._changed_gradients = None, False, False
