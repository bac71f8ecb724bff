"""Exact match of texts."""

from __future__ import annotations

from megatron_gemini.evaluation.metrics.inputs import Texts, mean, normalized
from megatron_gemini.evaluation.metrics.spec import MetricSpec


def exact_match(texts: Texts) -> float:
    """Share of answers that are the right text, but for case, spaces and a closing mark."""
    return mean(normalized(said) == normalized(right) for said, right in zip(texts.said, texts.right, strict=True))


EXACT_MATCH = MetricSpec("exact_match", Texts, exact_match, "higher", "{:.1%}", "answers that are the right text")
