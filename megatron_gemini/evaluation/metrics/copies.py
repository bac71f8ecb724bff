"""Images that are in the training data."""

from __future__ import annotations

from megatron_gemini.evaluation.metrics.inputs import CodeSets, mean
from megatron_gemini.evaluation.metrics.spec import MetricSpec


def copies(sets: CodeSets) -> float:
    """Share of images whose codes, all of them, are those of a training image; NaN without training images.

    Two real images may share all codes too, so the figure is read beside that of validation images.
    """
    # The codes of an image are one key, so that the training images are looked up and not compared one by one.
    known = set(sets.known)
    return mean(image in known for image in sets.images) if known else float("nan")


COPIES = MetricSpec("copies", CodeSets, copies, "lower", "{:.1%}", "images whose codes are a training image's")
