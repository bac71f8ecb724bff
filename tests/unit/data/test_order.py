"""An epoch has every sample once, in an order of its own, and only a window of shards is in use at a time."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_gemini.data.loading import order as order_module
from megatron_gemini.data.loading.order import Order
from megatron_gemini.data.random_stream import random_stream


def bounds(counts):
    return [0, *np.cumsum(counts).tolist()]


def epoch(order, number):
    total = len(order)
    found = [order.at(position) for position in range(number * total, (number + 1) * total)]
    assert {at for at, _ in found} == {number}
    return [sample for _, sample in found]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=12), st.integers(1, 30), st.integers(0, 3))
def test_every_epoch_has_every_sample_once(counts, window, number):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(order_module, "WINDOW", window)
        order = Order(bounds(counts), 7, "a")
        samples = epoch(order, number)
        assert sorted(samples) == list(range(sum(counts)))
        assert epoch(Order(bounds(counts), 7, "a"), number) == samples


def test_a_small_source_is_permuted_as_a_whole():
    order = Order(bounds([50, 70]), 3, "a")
    assert epoch(order, 2) == random_stream(3, "order", "a", 2).permutation(120).tolist()


def test_a_source_that_fills_a_window_is_still_permuted_as_a_whole():
    """However it is divided into shards: they are permuted only from the next sample on."""
    whole = epoch(Order(bounds([120]), 3, "a", window=120), 1)
    assert epoch(Order(bounds([50, 70]), 3, "a", window=120), 1) == whole
    assert epoch(Order(bounds([50, 70]), 3, "a", window=119), 1) != whole


def test_a_large_source_is_read_window_by_window_in_another_order_each_epoch(monkeypatch):
    monkeypatch.setattr(order_module, "WINDOW", 40)
    order = Order(bounds([10] * 12), 3, "a")
    windows = []
    for number in range(2):
        shards = [sample // 10 for sample in epoch(order, number)]
        windows.append([frozenset(shards[begin : begin + 40]) for begin in range(0, 120, 40)])
        assert [len(window) for window in windows[-1]] == [4, 4, 4]
        assert shards[:40] != sorted(shards[:40])
    assert windows[0] != windows[1]
    assert len(order._samples) <= 4


def test_positions_of_two_epochs_and_windows_may_be_asked_in_any_order(monkeypatch):
    monkeypatch.setattr(order_module, "WINDOW", 8)
    order = Order(bounds([3] * 7), 1, "a")
    expected = {position: Order(bounds([3] * 7), 1, "a").at(position) for position in range(63)}
    for position in np.random.default_rng(0).permutation(63).tolist():
        assert order.at(position) == expected[position]
