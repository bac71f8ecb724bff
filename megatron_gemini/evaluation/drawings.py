"""Drawn images, judged by a classifier of real ones: are they what was asked, varied, and new.

Shape suffixes: S pixels of a side.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from megatron_gemini.evaluation.images import Classifier, diversity, psnr, share
from megatron_gemini.evaluation.validation import Example, RealImages
from megatron_gemini.generation.api import Drawing, Generator
from megatron_gemini.generation.settings import SampleSettings


@dataclass
class Drawn:
    """What came of prompts for images; None where the answer held no image."""

    examples: list[Example]
    drawings: list[Drawing | None]

    def recognized(self, classifier: Classifier) -> float:
        """Share of the prompts whose image is recognized as the class that was asked for."""
        images = [drawing.pixels_HW3 for drawing in self.drawings if drawing is not None]
        labels = iter(classifier.recognise(images))
        said = [None if drawing is None else next(labels) for drawing in self.drawings]
        return share(label == example.label for label, example in zip(said, self.examples, strict=True))

    def existing(self) -> list[tuple[Example, Drawing]]:
        pairs = zip(self.examples, self.drawings, strict=True)
        return [(example, drawing) for example, drawing in pairs if drawing is not None]


def draw(generator: Generator, examples: Sequence[Example], settings: SampleSettings) -> Drawn:
    """The first image of every answer."""
    answers = generator.respond_all([example.prompt for example in examples], settings)
    return Drawn(list(examples), [next((p for p in a if isinstance(p, Drawing)), None) for a in answers])


def balanced(examples: Sequence[Example], classes: Sequence[str], count: int) -> list[Example]:
    """About `count` examples, equally many of every class that has any; examples repeat where there are too few."""
    by_class: dict[str, list[Example]] = defaultdict(list)
    for example in examples:
        by_class[example.label].append(example)
    present = [label for label in classes if by_class[label]]
    each = max(count // max(len(present), 1), 1)
    return [by_class[label][i % len(by_class[label])] for label in present for i in range(each)]


def judge_drawings(
    generator: Generator, drawn: Drawn, classifier: Classifier, train: RealImages, validation: RealImages
) -> dict[str, Any]:
    """image_recognized, image_diversity (drawn over real) and image_copied (drawn, and validation real images)."""
    pairs = drawn.existing()
    labels = [example.label for example, _ in pairs]
    real = like_for_like(validation, labels)
    known = set(generator.codes(train.images))
    return {
        "images_drawn": len(drawn.examples),
        "image_recognized": drawn.recognized(classifier),
        "image_diversity": diversity([d.pixels_HW3 for _, d in pairs], labels) / diversity(real.images, real.labels),
        "image_copied": share(drawing.codes in known for _, drawing in pairs),
        "image_copied_validation": share(codes in known for codes in generator.codes(validation.images)),
    }


def judge_tokenizer(
    generator: Generator, classifier: Classifier, train: RealImages, validation: RealImages
) -> tuple[dict[str, Any], list[np.ndarray]]:
    """code_usage on training images, reconstruction_recognized and _psnr of validation ones; and the
    reconstructions."""
    rebuilt = generator.pixels(generator.codes(validation.images))
    used = {code for codes in generator.codes(train.images) for code in codes}
    figures = {
        "code_usage": len(used) / len(generator.layout.code_range("image")),
        "reconstruction_recognized": classifier.accuracy(rebuilt, validation.labels),
        "reconstruction_psnr": psnr(validation.images, rebuilt),
    }
    return figures, rebuilt


def like_for_like(real: RealImages, labels: Sequence[str]) -> RealImages:
    """As many real images of each class as `labels` has, or all there are."""
    chosen = RealImages([], [], [])
    for label in sorted(set(labels)):
        mine = (x for x, of in zip(real.images, real.labels, strict=True) if of == label)
        for image in islice(mine, list(labels).count(label)):
            chosen.images.append(image)
            chosen.labels.append(label)
            chosen.augmented.append(False)
    return chosen
