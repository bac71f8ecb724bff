"""Structural similarity of images (Wang, Bovik, Sheikh and Simoncelli 2004, "Image quality assessment").

Shape suffixes: H rows and W columns of pixels, M the five maps whose local means are needed.
"""

from __future__ import annotations

import numpy as np

from megatron_gemini.evaluation.metrics.inputs import ImageHW3, ImagePairs, mean
from megatron_gemini.evaluation.metrics.spec import MetricSpec

WINDOW, SIGMA = 11, 1.5  # pixels, as in the paper
C1, C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2  # keep the quotient finite where an image is black, or flat
LUMINANCE = (0.299, 0.587, 0.114)  # of red, green, blue (ITU-R BT.601)


def similarity(made_HW3: ImageHW3, original_HW3: ImageHW3) -> float:
    """Mean over all places of the window of the paper's equation 13, on luminance x and y in [0, 255]:

        (2 mx my + C1) (2 sxy + C2) / ((mx^2 + my^2 + C1) (sx^2 + sy^2 + C2))

    where m, s^2 and sxy are means, variances and the covariance under a Gaussian window. The window has 11 x 11 pixels
    and a deviation of 1.5; in an image with a shorter side, the largest odd side that fits. It never leaves the image.
    """
    x_HW, y_HW = (image.astype(np.float64) @ LUMINANCE for image in (made_HW3, original_HW3))
    side = min(WINDOW, *x_HW.shape)
    side -= 1 - side % 2  # odd, so that it has a middle
    weight = np.exp(-((np.arange(side) - side // 2) ** 2) / (2 * SIGMA**2))
    weight /= weight.sum()
    maps_MHW = np.stack([x_HW, y_HW, x_HW**2, y_HW**2, x_HW * y_HW])
    # A Gaussian of two dimensions is the product of two of one: 2 * 11 products a pixel in the place of 11 * 11.
    for axis in (1, 2):
        places = maps_MHW.shape[axis] - side + 1
        maps_MHW = sum(w * maps_MHW.take(range(i, i + places), axis) for i, w in enumerate(weight))
    mx, my, xx, yy, xy = maps_MHW
    luminance = (2 * mx * my + C1) / (mx**2 + my**2 + C1)
    structure = (2 * (xy - mx * my) + C2) / (xx - mx**2 + yy - my**2 + C2)
    return float(np.mean(luminance * structure))


def ssim(pairs: ImagePairs) -> float:
    """Mean over the pairs, at most 1, which only equal images reach."""
    return mean(similarity(made, original) for made, original in zip(pairs.made, pairs.originals, strict=True))


SSIM = MetricSpec("ssim", ImagePairs, ssim, "higher", "{:.3f}", "structural similarity")
