"""Evaluates the quickstart's model: all that `megatron-gemini evaluate` finds out, and which digits it draws.

    python examples/quickstart/judge_digits.py --checkpoint runs/quickstart --disjoint sklearn_index voice

The options are those of `megatron-gemini evaluate`. A classifier of real digits reads what the model drew. Its figures
are added to the report, and the sheet names the quickstart's main ones:

- image_recognized, speech_to_image_recognized: share of the drawings that are read as the digit that was asked for
- reconstruction_recognized: share of the validation digits that are still read right after the image tokenizer
- classifier_accuracy: share of the real validation digits that the classifier reads right, its own limit
- interleave_accuracy: share of the documents whose last item, a word or a digit, the model adds right
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from sklearn.svm import SVC

from megatron_gemini.cli import end, run_command
from megatron_gemini.evaluate import evaluate_command, write
from megatron_gemini.evaluation.json_data import Json, rounded
from megatron_gemini.evaluation.metrics.inputs import ImageHW3, mean, normalized

if TYPE_CHECKING:
    from megatron_gemini.evaluation.asking import Continued, Drawn
    from megatron_gemini.evaluation.report import Results

GRID = 8  # the classifier sees an image as GRID x GRID mean grey values, as scikit-learn's digits are stored
PHRASES = {
    "caption_exact_match": "images described",
    "transcribe_exact_match": "speech understood",
    "video_caption_exact_match": "clips described",
    "image_recognized": "drawings recognized",
}


class Classifier:
    """A support vector machine with a Gaussian kernel, trained on real images and their labels only.

    Images: uint8[H, W, 3] of any size. The same size as the model's is best: what resizing does to an image is then
    the same for real and drawn ones.
    """

    def __init__(self, images: Sequence[ImageHW3], labels: Sequence[str]) -> None:
        if len(set(labels)) < 2:
            raise ValueError(f"a classifier needs images of 2 classes or more; these have {sorted(set(labels))}")
        self.classes = sorted(set(labels))
        self._machine = SVC(C=10.0, gamma="scale").fit(_features(images), list(labels))

    def recognize(self, images: Sequence[ImageHW3]) -> list[str]:
        """The label of each image."""
        return [str(label) for label in self._machine.predict(_features(images))] if len(images) else []

    def accuracy(self, images: Sequence[ImageHW3], labels: Sequence[str]) -> float:
        """Share of images that are recognized as their label."""
        return mean(said == label for said, label in zip(self.recognize(images), labels, strict=True))


def _features(images: Sequence[ImageHW3]) -> np.ndarray:
    grey = [Image.fromarray(image_HW3).convert("L") for image_HW3 in images]
    small = [np.asarray(image.resize((GRID, GRID), Image.Resampling.BOX), np.float32) for image in grey]
    return np.stack(small).reshape(len(small), -1) / 255


def recognized(drawn: Drawn, classifier: Classifier) -> float:
    """Share of the prompts whose image is recognized as the class that was asked for; no image is a wrong one."""
    labels = iter(classifier.recognize([drawing.pixels_HW3 for _, drawing in drawn.existing()]))
    said = [None if drawing is None else next(labels) for drawing in drawn.drawings]
    return mean(label == example.label for label, example in zip(said, drawn.examples, strict=True))


def continues(continued: Continued, classifier: Classifier) -> bool:
    """Whether the right item was added: the same word, or a digit that is read as the document's own is read."""
    added, right = continued.added, continued.right
    if added is None or isinstance(added, str) or isinstance(right, str):
        return isinstance(right, str) and normalized(added if isinstance(added, str) else "") == normalized(right)
    drawn, real = classifier.recognize([added.pixels_HW3, right.pixels_HW3])
    return drawn == real


def judge(results: Results) -> dict[str, Json]:
    """The figures of this file's head, as far as the validation data asks for them."""
    # The altered copies that training adds would teach the classifier to forgive what the model gets wrong.
    real, validation = results.train.originals(), results.validation
    classifier = Classifier(real.images, real.labels)
    figures = {
        "classifier_accuracy": classifier.accuracy(validation.images, validation.labels),
        "reconstruction_recognized": classifier.accuracy(results.rebuilt, validation.labels),
    }
    for task, name in (("generate", "image_recognized"), ("speech_to_image", "speech_to_image_recognized")):
        if task in results.drawn:
            figures[name] = recognized(results.drawn[task], classifier)
    if continued := results.continued.get("interleave"):
        figures["interleave_accuracy"] = mean(continues(item, classifier) for item in continued)
    return {name: rounded(value) for name, value in figures.items()}


def main(argv: list[str]) -> int:
    """Evaluate, judge the digits, write both. Returns the exit status."""
    evaluation = evaluate_command(argv)
    evaluation.report = {**judge(evaluation.results), **evaluation.report}
    write(evaluation, PHRASES)
    return 0


if __name__ == "__main__":
    end(run_command(main, sys.argv[1:]))
