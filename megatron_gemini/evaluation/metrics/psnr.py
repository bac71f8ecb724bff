"""Peak signal-to-noise ratio of images."""

from __future__ import annotations

import math

import numpy as np

from megatron_gemini.evaluation.metrics.inputs import ImagePairs, mean
from megatron_gemini.evaluation.metrics.spec import MetricSpec

EXACT = 99.0  # dB of an exact copy, whose ratio is infinite: one such image would make the mean of all infinite


def psnr(pairs: ImagePairs) -> float:
    """Mean over the images of 10 log10(255^2 / mean squared error of all pixels and colors), in dB."""
    ratios = []
    for made, original in zip(pairs.made, pairs.originals, strict=True):
        # float64, since the difference of two bytes is no byte.
        error = float(np.mean((original.astype(np.float64) - made.astype(np.float64)) ** 2))
        ratios.append(min(10 * math.log10(255**2 / error), EXACT) if error else EXACT)
    return mean(ratios)


PSNR = MetricSpec("psnr", ImagePairs, psnr, "higher", "{:.1f} dB", "peak signal-to-noise ratio")
