"""How far apart the drawn images of one class are, beside real ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import combinations

import numpy as np

from megatron_gemini.evaluation.metrics.inputs import ImageHW3, ImageSets, mean
from megatron_gemini.evaluation.metrics.spec import MetricSpec


def spread(images: Sequence[ImageHW3], labels: Sequence[str]) -> float:
    """Mean over the classes of the mean distance (L2 over pixels in [0, 1]) between two images of the class.

    NaN where no class has two images.
    """
    distances = []
    for label in sorted(set(labels)):
        mine = [np.asarray(x, np.float32).ravel() / 255 for x, of in zip(images, labels, strict=True) if of == label]
        if len(mine) > 1:
            distances.append(float(np.mean([np.linalg.norm(a - b) for a, b in combinations(mine, 2)])))
    return mean(distances)


def diversity(sets: ImageSets) -> float:
    """The drawn images' `spread` over that of as many real ones of each class, or of all there are.

    1 is as varied as the real ones. A model that draws the same image for a prompt again and again has 0.
    """
    real, labels = [], []
    # No class that was not drawn takes part, and of the others no more than were drawn: pairs grow with the square.
    room = Counter(sets.labels)
    for image, label in zip(sets.real, sets.real_labels, strict=True):
        if room[label]:
            room[label] -= 1
            real.append(image)
            labels.append(label)
    among_real = spread(real, labels)
    return spread(sets.drawn, sets.labels) / among_real if among_real else float("nan")


DIVERSITY = MetricSpec("diversity", ImageSets, diversity, "neither", "{:.2f}", "distances in a class, over real ones'")
