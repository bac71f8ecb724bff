"""Groups of the optimizer's state on a disk; tests/distributed trains with real ones where a disk can be used."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from torch import nn

from megatron_gemini.engine.internals.zero3 import Stage3Wrapper

SMALL = 9


@pytest.fixture
def moves():
    return []


@pytest.fixture
def wrapper(moves):
    """Of an engine without parameters, whose groups are on a disk, all but the small one."""
    optimizer = SimpleNamespace(
        optimizer=None,
        _swappable_optimizer_subgroup=lambda group: group != SMALL,
        _optimizer_states_and_gradient_swap_in=lambda group: moves.append(f"in {group}"),
        _writeback_swap_state=lambda group, state, gradients: moves.append(
            f"out {group}" + " with state" * state + " with gradients" * gradients
        ),
    )
    return Stage3Wrapper(SimpleNamespace(optimizer=optimizer, module=nn.Module()))


def test_one_group_at_a_time_is_in_memory(wrapper, moves):
    for group in (0, 0, 1, 0):
        wrapper.bring_in(group)
    wrapper.put_back()
    wrapper.put_back()
    assert moves == ["in 0", "out 0", "in 1", "out 1", "in 0", "out 0"]


def test_what_was_changed_while_a_group_was_in_memory_is_written_back(wrapper, moves):
    wrapper.bring_in(0, state=True)
    wrapper.bring_in(0)
    wrapper.bring_in(1, gradients=True)
    wrapper.bring_in(1, state=True)
    wrapper.bring_in(2)
    wrapper.put_back()
    assert moves == ["in 0", "out 0 with state", "in 1", "out 1 with state with gradients", "in 2", "out 2"]


def test_a_small_group_never_leaves_the_memory_nor_moves_another(wrapper, moves):
    wrapper.bring_in(0)
    wrapper.bring_in(SMALL, state=True)
    wrapper.put_back()
    assert moves == ["in 0", "out 0"]
