"""Steps that changed no weight: each reason is told once in a row of them, and forgotten behind it."""

import pytest

from megatron_gemini.exit_status import NotLearningError
from megatron_gemini.training.skipped import NO_WEIGHT, NOT_FINITE, SkippedSteps


def test_a_step_that_trained_ends_the_row_and_its_reasons() -> None:
    skipped = SkippedSteps(2)
    assert [skipped.add(reason) for reason in (NOT_FINITE, "", NOT_FINITE, NOT_FINITE)] == [True, False, True, False]
    skipped.add("")
    assert skipped.add(NO_WEIGHT)
    skipped.check(6, False, "nothing was saved")
    assert not skipped.add(NO_WEIGHT)
    with pytest.raises(NotLearningError, match=r"^steps 6 to 7 changed no weight \(no token had a loss weight; train"):
        skipped.check(7, False, "nothing was saved")
