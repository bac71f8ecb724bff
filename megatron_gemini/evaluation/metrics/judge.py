"""All metrics of some input."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_gemini.evaluation.metrics.inputs import Inputs
from megatron_gemini.evaluation.metrics.spec import Score
from megatron_gemini.registry import METRICS


def judge(subject: str, inputs: Inputs, names: Sequence[str] = ()) -> dict[str, Score]:
    """The figures SUBJECT_METRIC of all metrics that take such inputs, or of those that are named."""
    # A metric that takes other inputs has no figure here, named or not: one list of names serves every subject.
    scores = {name: METRICS.get(name).judge(inputs) for name in names or METRICS}
    return {f"{subject}_{name}": score for name, score in scores.items() if score is not None}
