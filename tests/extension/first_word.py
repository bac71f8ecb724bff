"""A toy metric: whether answers begin with the right word."""

from __future__ import annotations

from megatron_gemini.evaluation.metrics.inputs import Texts, mean, normalized
from megatron_gemini.evaluation.metrics.spec import MetricSpec


def first_word(texts: Texts) -> float:
    """Share of answers whose first word is that of the right text, but for case; NaN without answers."""
    pairs = [(normalized(said), normalized(right)) for said, right in zip(texts.said, texts.right, strict=True)]
    return mean(said.split()[:1] == right.split()[:1] for said, right in pairs)


FIRST_WORD = MetricSpec("first_word", Texts, first_word, "higher", "{:.1%}", "answers that begin with the right word")
