"""What a metric is."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Literal, TypeAlias, TypeVar

from megatron_gemini.evaluation.metrics.inputs import CodedImages, CodeSets, ImagePairs, ImageSets, Inputs, Texts

Taken = TypeVar("Taken", bound=Inputs)


@dataclass(frozen=True)
class MetricSpec(Generic[Taken]):
    """A figure of a model's answers. A file of this folder holds one or some of them; the package's `registry.py` names
    them all.

    name: of the metric. A report's figure is called by what was judged and this: caption_exact_match.
    takes: the class of `inputs.py` that it judges. score: one number of it; NaN where there is nothing to judge.
    better: which way the figure improves; "neither" for one that is read beside another.
    shown: how a person is shown the number, a format of `str.format`. what: the figure in a line.
    """

    name: str
    takes: type[Taken]
    score: Callable[[Taken], float]
    better: Literal["higher", "lower", "neither"]
    shown: str
    what: str

    def judge(self, inputs: Inputs) -> Score | None:
        """The figure; None for inputs that are another metric's."""
        return Score(self.score(inputs), self.shown, self.better) if isinstance(inputs, self.takes) else None


@dataclass(frozen=True)
class Score:
    """A figure and how it is read."""

    value: float
    shown: str
    better: str

    def __str__(self) -> str:
        return self.shown.format(self.value) if math.isfinite(self.value) else "nothing to judge"


Metric: TypeAlias = (
    MetricSpec[Texts] | MetricSpec[ImagePairs] | MetricSpec[ImageSets] | MetricSpec[CodedImages] | MetricSpec[CodeSets]
)
"""Any of them."""
