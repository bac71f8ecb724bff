"""The learning rate of a step. Steps count from 0; the first is already warmed up by one step, the last is the end.

With s = step + 1 steps begun, W of warm-up and S in all: s <= W: peak * s / W. Afterwards the factor goes from 1 at
s = W to `final_ratio` at s = S. It goes along half a cosine (Loshchilov and Hutter, arXiv:1608.03983) or a line. For
`wsd` it stays and then goes along a line over the last D steps (warm-up-stable-decay: Hu et al., MiniCPM,
arXiv:2404.06395).
"""

from __future__ import annotations

import math

from megatron_gemini.config.training import ScheduleConfig


def learning_rate(step: int, peak: float, schedule: ScheduleConfig, steps: int) -> float:
    """The learning rate of optimizer step `step` of `steps`, where `peak` is optimizer.lr.

    Raises a `ValueError` for a step outside the run, and where `check_schedule` does.
    """
    check_schedule(schedule, steps)
    if not 0 <= step < steps:
        raise ValueError(f"step is {step}; a run of {steps} steps has 0 to {steps - 1}")
    begun = step + 1  # so that the first update has a rate above zero, and the last one the final rate
    if begun <= schedule.warmup_steps:
        return peak * begun / schedule.warmup_steps
    length = schedule.decay_steps if schedule.kind == "wsd" else steps - schedule.warmup_steps
    remaining = min(steps - begun, length) / length if length else 1.0  # from 1, the decay's start, to 0, its end
    shape = (1 - math.cos(math.pi * remaining)) / 2 if schedule.kind == "cosine" else remaining
    return peak * (schedule.final_ratio + (1 - schedule.final_ratio) * shape)


def check_schedule(schedule: ScheduleConfig, steps: int) -> None:
    """Raise a `ValueError` where warm-up and decay do not fit into the run."""
    if schedule.kind == "wsd" and schedule.warmup_steps + schedule.decay_steps > steps:
        raise ValueError(
            f"schedule.warmup_steps ({schedule.warmup_steps}) and schedule.decay_steps ({schedule.decay_steps}) "
            f"do not fit into train.steps ({steps}); lower them or train for longer"
        )
    # These kinds decay from the warm-up's end to the run's end, and so need a step between the two.
    if schedule.kind != "wsd" and schedule.warmup_steps >= steps:
        raise ValueError(
            f"schedule.warmup_steps is {schedule.warmup_steps}, which leaves nothing of train.steps ({steps}) to "
            f"decay; use {steps - 1} or less, or train for longer"
        )
