"""The whole evaluation of a model: every validation source by its task, one report and what the sample sheet shows.

Shape suffixes: F frames, H rows and W columns of pixels.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_gemini.config.data import SourceConfig
from megatron_gemini.data.samples.decode import SampleDecoder
from megatron_gemini.evaluation.answers import accuracy, last_item_accuracy, said_and_right
from megatron_gemini.evaluation.drawings import Drawn, balanced, draw, judge_drawings, judge_tokenizer
from megatron_gemini.evaluation.images import Classifier
from megatron_gemini.evaluation.separation import compare
from megatron_gemini.evaluation.validation import (
    Example,
    RealImages,
    read_examples,
    read_fingerprint,
    read_images,
)
from megatron_gemini.generation.api import Generator
from megatron_gemini.generation.settings import SampleSettings

TEXT_METRICS = {"caption": "caption_accuracy", "transcribe": "speech_accuracy", "video_caption": "video_accuracy"}
GREEDY = SampleSettings(temperature=0.0)


@dataclass(frozen=True)
class EvaluationSettings:
    """drawing: how images are sampled; texts are always the likeliest.

    samples: most validation samples of a source. images: drawn from text prompts, over all classes.
    disjoint: metadata fields of the shards that name where a sample comes from (a voice, an original), none of whose
        values may be in training and validation shards. checked: most samples of a set of shards compared.
    """

    drawing: SampleSettings = field(default_factory=SampleSettings)
    samples: int = 400
    images: int = 200
    disjoint: tuple[str, ...] = ()
    checked: int = 100_000


@dataclass
class Results:
    """figures: for the report. The rest is what the sample sheet shows."""

    figures: dict[str, Any] = field(default_factory=dict)
    answers: dict[str, list[tuple[Example, str, str]]] = field(default_factory=dict)
    """By task: the example, what was said and what is right."""
    drawn: dict[str, Drawn] = field(default_factory=dict)
    """By task."""
    validation: RealImages = field(default_factory=lambda: RealImages([], [], []))
    rebuilt: list = field(default_factory=list)
    """Of each validation image, what the image tokenizer makes of its codes, uint8[H, W, 3]."""


def evaluate(
    generator: Generator,
    train: Sequence[SourceConfig],
    validation: Sequence[SourceConfig],
    settings: EvaluationSettings,
) -> Results:
    """Answers every validation source, draws, and judges it all.

    train: sources whose images teach the classifier, and that must have nothing in common with the validation ones.
    Raises ValueError for shards that are missing or empty.
    """
    begin = time.perf_counter()
    results, skipped = Results(), Counter[str]()
    decoder = SampleDecoder(generator.config)
    examples: dict[str, list[Example]] = {}
    for source in validation:
        part = read_examples(source, decoder, settings.samples, settings.drawing.seed, skipped)
        examples.setdefault(source.task, []).extend(part)
    _texts(generator, examples, results)
    if generator.codes_per_image:
        _images(generator, examples, train, validation, settings, results)
    elif "interleave" in examples:
        results.figures["interleave_accuracy"] = last_item_accuracy(generator, examples["interleave"], GREEDY, None)
    ours, theirs = (read_fingerprint(side, settings.disjoint, settings.checked) for side in (train, validation))
    results.figures |= {
        "validation": compare(ours, theirs, settings.disjoint),
        "validation_samples": {task: len(found) for task, found in examples.items()},
        "validation_unreadable": dict(skipped),
        "evaluation_seconds": round(time.perf_counter() - begin, 2),
    }
    results.figures = rounded(results.figures)
    return results


def _texts(generator: Generator, examples: dict[str, list[Example]], results: Results) -> None:
    for task, metric in TEXT_METRICS.items():
        if found := examples.get(task):
            pairs = said_and_right(generator, found, GREEDY)
            results.figures[metric] = accuracy(pairs)
            results.answers[task] = [(e, said, right) for e, (said, right) in zip(found, pairs, strict=True)]


def _images(
    generator: Generator,
    examples: dict[str, list[Example]],
    train: Sequence[SourceConfig],
    validation: Sequence[SourceConfig],
    settings: EvaluationSettings,
    results: Results,
) -> None:
    """Everything that a classifier of real images judges; nothing where the shards' images have no classes."""
    side, figures = generator.config.image_tokenizer.image_size, results.figures
    trained = read_images(train, side, settings.checked)
    real = trained.originals()
    results.validation = read_images(validation, side, settings.samples)
    if len(set(real.labels)) < 2 or not results.validation.images:
        return
    classifier = Classifier(real.images, real.labels)
    if "generate" in examples:
        asked = balanced(examples["generate"], classifier.classes, settings.images)
        results.drawn["generate"] = draw(generator, asked, settings.drawing)
        figures |= judge_drawings(generator, results.drawn["generate"], classifier, trained, results.validation)
    figures["classifier_accuracy"] = classifier.accuracy(results.validation.images, results.validation.labels)
    tokenizer, results.rebuilt = judge_tokenizer(generator, classifier, trained, results.validation)
    figures |= tokenizer
    if "speech_to_image" in examples:
        asked = balanced(examples["speech_to_image"], classifier.classes, settings.images)
        results.drawn["speech_to_image"] = draw(generator, asked, settings.drawing)
        figures["speech_to_image_recognized"] = results.drawn["speech_to_image"].recognized(classifier)
    if "interleave" in examples:
        mixed = replace(settings.drawing, temperature=GREEDY.temperature)
        figures["interleave_accuracy"] = last_item_accuracy(generator, examples["interleave"], mixed, classifier)


def rounded(value: Any) -> Any:
    """Plain data for JSON: four decimals, and None where there is no number."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, float):
        return round(value, 4) if math.isfinite(value) else None
    return value
