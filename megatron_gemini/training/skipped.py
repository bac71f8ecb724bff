"""Steps that changed no weight: how many there were in a row, and when they are too many.

A single one is no failure. A run of them is: the weights are lost, or the data hold nothing to learn.
"""

from __future__ import annotations

from megatron_gemini.exit_status import NotLearningError

NOT_FINITE = "the gradient norm was not finite"
NO_WEIGHT = "no token had a loss weight"
_WAYS_OUT = {
    NOT_FINITE: "lower optimizer.lr or look at the data of these steps",
    NO_WEIGHT: "check the loss weights of the objective section and the data's tasks",
}


class SkippedSteps:
    """Counts the steps of this process. most: so many in a row are allowed (`train.max_skipped_steps`)."""

    def __init__(self, most: int) -> None:
        self.most, self.in_a_row, self.trained = most, 0, 0
        self.reasons: list[str] = []

    def add(self, reason: str) -> bool:
        """Count a step; reason: why it was skipped, empty if it was not. Whether the reason is a new one in a row."""
        if not reason:
            self.in_a_row, self.reasons = 0, []
            self.trained += 1
            return False
        self.in_a_row += 1
        new = reason not in self.reasons
        self.reasons += [reason] if new else []
        return new

    def check(self, step: int, last: bool, newest: str) -> None:
        """Raise `NotLearningError` if the run should not go on, or should not count as one that trained.

        step: steps done. last: no step follows. newest: the newest checkpoint, in words.
        """
        # A run that is shorter than the bound is no success either if not one of its steps trained.
        if self.in_a_row < self.most and not (last and self.in_a_row and not self.trained):
            return
        steps = f"steps {step - self.in_a_row + 1} to {step}" if self.in_a_row > 1 else f"step {step}"
        ways_out = "; ".join(_WAYS_OUT[reason] for reason in self.reasons)
        raise NotLearningError(
            f"{steps} changed no weight ({', '.join(self.reasons)}; train.max_skipped_steps is {self.most}); "
            f"{ways_out}; {newest}"
        )
