"""The learning rate at every step, against values computed by hand and against its properties."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_gemini.config.training import ScheduleConfig
from megatron_gemini.training.schedule import check_schedule, learning_rate


def rates(schedule: ScheduleConfig, steps: int, peak: float = 1.0) -> list[float]:
    return [learning_rate(step, peak, schedule, steps) for step in range(steps)]


def test_cosine_by_hand():
    schedule = ScheduleConfig("cosine", warmup_steps=2, final_ratio=0.2)
    # After the warm-up: 0.2 + 0.8 * (1 + cos(pi * i / 4)) / 2 for i = 1, 2, 3, 4.
    expected = [5.0, 10.0, 8.828427124746190, 6.0, 3.171572875253810, 2.0]
    assert rates(schedule, 6, peak=10.0) == pytest.approx(expected, abs=1e-12)


def test_linear_by_hand():
    schedule = ScheduleConfig("linear", warmup_steps=4, final_ratio=0.0)
    assert rates(schedule, 8) == pytest.approx([0.25, 0.5, 0.75, 1.0, 0.75, 0.5, 0.25, 0.0])


def test_warmup_stable_decay_by_hand():
    schedule = ScheduleConfig("wsd", warmup_steps=2, decay_steps=2, final_ratio=0.1)
    assert rates(schedule, 7) == pytest.approx([0.5, 1.0, 1.0, 1.0, 1.0, 0.55, 0.1])


def test_without_decay_wsd_stays_at_its_peak():
    assert rates(ScheduleConfig("wsd", warmup_steps=1, decay_steps=0), 3) == [1.0, 1.0, 1.0]


schedules = st.builds(
    ScheduleConfig,
    kind=st.sampled_from(["cosine", "linear", "wsd"]),
    warmup_steps=st.integers(0, 20),
    decay_steps=st.integers(1, 20),
    final_ratio=st.floats(0, 1),
)


@settings(deadline=None)
@given(schedule=schedules, more=st.integers(1, 40))
def test_every_schedule_rises_to_the_peak_then_falls_to_the_final_ratio(schedule, more):
    steps = schedule.warmup_steps + schedule.decay_steps + more
    curve = rates(schedule, steps, peak=2.0)
    warmed = schedule.warmup_steps
    assert all(a < b for a, b in itertools.pairwise(curve[:warmed]))
    assert all(a >= b for a, b in itertools.pairwise(curve[warmed:]))
    assert max(curve) <= 2.0
    assert min(curve) >= 0.0
    assert warmed == 0 or curve[warmed - 1] == 2.0
    assert curve[-1] == pytest.approx(2.0 * schedule.final_ratio, abs=1e-12)


@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_a_warmup_without_an_end_is_an_error(kind):
    schedule = ScheduleConfig(kind, warmup_steps=20)
    check_schedule(schedule, 21)
    with pytest.raises(ValueError, match=r"schedule\.warmup_steps is 20, .*train\.steps \(20\).* use 19 or less"):
        check_schedule(schedule, 20)


def test_warmup_and_decay_longer_than_the_run_are_an_error():
    schedule = ScheduleConfig("wsd", warmup_steps=20, decay_steps=100)
    check_schedule(schedule, 120)
    with pytest.raises(ValueError, match=r"schedule\.warmup_steps \(20\) and schedule\.decay_steps \(100\) .*\(119\)"):
        check_schedule(schedule, 119)
    check_schedule(dataclasses.replace(schedule, kind="cosine"), 119)


@pytest.mark.parametrize("step", [-1, 30])
def test_a_step_outside_the_run_is_an_error(step):
    with pytest.raises(ValueError, match=f"step is {step}; a run of 30 steps has 0 to 29"):
        learning_rate(step, 1.0, ScheduleConfig(), 30)
