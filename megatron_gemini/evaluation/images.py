"""Judging images by real ones: a classifier, and how far apart the images of a class are.

Shape suffixes: H rows and W columns of pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations

import numpy as np
from PIL import Image
from sklearn.svm import SVC

GRID = 8  # the classifier sees an image as GRID x GRID mean grey values


class Classifier:
    """A support vector machine with a Gaussian kernel, trained on real images and their labels only.

    Images: uint8[H, W, 3] of any size. The same size as the model's is best: what resizing does to an image is then
    the same for real and drawn ones.
    """

    def __init__(self, images: Sequence[np.ndarray], labels: Sequence[str]) -> None:
        if len(set(labels)) < 2:
            raise ValueError(f"a classifier needs images of 2 classes or more; these have {sorted(set(labels))}")
        self.classes = sorted(set(labels))
        self._machine = SVC(C=10.0, gamma="scale").fit(_features(images), list(labels))

    def recognise(self, images: Sequence[np.ndarray]) -> list[str]:
        """The label of each image."""
        return [str(label) for label in self._machine.predict(_features(images))] if len(images) else []

    def accuracy(self, images: Sequence[np.ndarray], labels: Sequence[str]) -> float:
        """Share of images that are recognized as their label."""
        return share(said == label for said, label in zip(self.recognise(images), labels, strict=True))


def share(truths: Iterable[bool]) -> float:
    """Share of true values; NaN of none."""
    values = list(truths)
    return sum(values) / len(values) if values else float("nan")


def diversity(images: Sequence[np.ndarray], labels: Sequence[str]) -> float:
    """Mean over the classes of the mean distance (L2 over pixels in [0, 1]) between two images of the class."""
    distances = []
    for label in sorted(set(labels)):
        mine = [np.asarray(x, np.float32).ravel() / 255 for x, of in zip(images, labels, strict=True) if of == label]
        if len(mine) > 1:
            distances.append(np.mean([np.linalg.norm(a - b) for a, b in combinations(mine, 2)]))
    return float(np.mean(distances)) if distances else float("nan")


def psnr(originals: Sequence[np.ndarray], rebuilt: Sequence[np.ndarray]) -> float:
    """Mean peak signal-to-noise ratio of uint8 images, in dB; an exact copy counts as 99 dB."""
    ratios = []
    for original, copy in zip(originals, rebuilt, strict=True):
        error = np.mean((original.astype(np.float64) - copy.astype(np.float64)) ** 2)
        ratios.append(min(10 * np.log10(255.0**2 / max(float(error), 1e-12)), 99.0))
    return float(np.mean(ratios))


def resized(image_HW3: np.ndarray, side: int) -> np.ndarray:
    """uint8[side, side, 3]; an image of that size unchanged."""
    if image_HW3.shape[:2] == (side, side):
        return image_HW3
    return np.asarray(Image.fromarray(image_HW3).resize((side, side), Image.Resampling.BICUBIC))


def _features(images: Sequence[np.ndarray]) -> np.ndarray:
    grey = [Image.fromarray(image_HW3).convert("L") for image_HW3 in images]
    small = [np.asarray(image.resize((GRID, GRID), Image.Resampling.BOX), np.float32) for image in grey]
    return np.stack(small).reshape(len(small), -1) / 255
