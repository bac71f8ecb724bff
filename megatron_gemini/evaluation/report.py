"""The whole evaluation of a model: every validation source by its task, the figures, what the sample sheet shows."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from megatron_gemini.config.data import SourceConfig
from megatron_gemini.data.samples.decode import SampleDecoder
from megatron_gemini.data.samples.items import Codes, Text
from megatron_gemini.evaluation.asking import (
    Continued,
    Drawn,
    Said,
    ask_drawings,
    ask_last_items,
    ask_texts,
    balanced,
)
from megatron_gemini.evaluation.json_data import Json
from megatron_gemini.evaluation.metrics.inputs import (
    CodedImages,
    CodeSets,
    ImageHW3,
    ImagePairs,
    ImageSets,
    Inputs,
    Texts,
)
from megatron_gemini.evaluation.metrics.judge import judge
from megatron_gemini.evaluation.metrics.spec import Score
from megatron_gemini.evaluation.separation import compare
from megatron_gemini.evaluation.validation import (
    RealImages,
    ValidationExample,
    read_examples,
    read_fingerprint,
    read_images,
)
from megatron_gemini.generation.api import Generator
from megatron_gemini.generation.settings import SampleSettings

# Texts are judged by the likeliest answer: what a model knows, whatever the seed.
GREEDY = SampleSettings(temperature=0.0)


@dataclass(frozen=True)
class EvaluationSettings:
    """drawing: how images are sampled; texts are always the likeliest.

    samples: most validation samples of a source. images: drawn for a task, over all classes.
    disjoint: metadata fields of the shards that name where a sample comes from (a voice, an original), none of whose
        values may be in training and validation shards. checked: most samples of a set of shards compared.
    metrics: names of those that are computed; empty for all that there are.
    """

    drawing: SampleSettings = field(default_factory=SampleSettings)
    samples: int = 400
    images: int = 200
    disjoint: tuple[str, ...] = ()
    checked: int = 100_000
    metrics: tuple[str, ...] = ()


@dataclass
class Results:
    """scores: the metrics' figures by name. facts: the rest of the report. What follows is what they were made of."""

    scores: dict[str, Score] = field(default_factory=dict)
    facts: dict[str, Json] = field(default_factory=dict)
    separate: bool = False
    """Whether training and validation data were compared and share nothing."""
    said: dict[str, list[Said]] = field(default_factory=dict)
    """By task."""
    drawn: dict[str, Drawn] = field(default_factory=dict)
    """By task."""
    not_asked: dict[str, int] = field(default_factory=dict)
    """Samples that ask for a drawing, of a model that cannot draw, by task."""
    continued: dict[str, list[Continued]] = field(default_factory=dict)
    """By task."""
    train: RealImages = field(default_factory=lambda: RealImages([], [], []))
    validation: RealImages = field(default_factory=lambda: RealImages([], [], []))
    rebuilt: list[ImageHW3] = field(default_factory=list)
    """Of each validation image, what the image tokenizer makes of its codes."""


def evaluate(
    generator: Generator,
    train: Sequence[SourceConfig],
    validation: Sequence[SourceConfig],
    settings: EvaluationSettings,
) -> Results:
    """Asks every validation source, draws, and computes the metrics.

    train: sources whose images the drawn ones are compared with, and which must share nothing with the validation
        ones. Raises ValueError for shards that are missing or empty, and for an unknown metric.
    """
    begin = time.perf_counter()
    results, skipped = Results(), Counter[str]()
    decoder = SampleDecoder(generator.config)
    examples: dict[str, list[ValidationExample]] = {}
    for source in validation:
        part = read_examples(source, decoder, settings.samples, settings.drawing.seed, skipped)
        examples.setdefault(source.task, []).extend(part)
    # Sources of a task are asked together, so that a figure is of the task and not of one of its files.
    for task, found in examples.items():
        _ask(generator, task, found, settings, results)
    if generator.codebook:
        # Of the image tokenizer's size, drawn images and real ones alike, or resizing alone would tell them apart.
        side = generator.config.image_tokenizer.image_size
        results.train = read_images(train, side, settings.checked)
        results.validation = read_images(validation, side, settings.samples)
    for subject, inputs in judged_inputs(generator, results):
        results.scores |= judge(subject, inputs, settings.metrics)
    ours, theirs = (read_fingerprint(side, settings.disjoint, settings.checked) for side in (train, validation))
    separation = compare(ours, theirs, settings.disjoint)
    results.separate = separation["separate"] is True
    results.facts = {
        "images_asked": {task: len(drawn.examples) for task, drawn in results.drawn.items()},
        "images_drawn": {task: len(drawn.existing()) for task, drawn in results.drawn.items()},
        "images_not_asked": dict(results.not_asked),
        "validation": separation,
        "validation_samples": {task: len(found) for task, found in examples.items()},
        "validation_unreadable": dict(skipped),
        "evaluation_seconds": round(time.perf_counter() - begin, 2),
    }
    return results


def _ask(
    generator: Generator, task: str, examples: list[ValidationExample], settings: EvaluationSettings, results: Results
) -> None:
    """Asks the examples of a task. What an answer is made of, and not the task's name, says how it is judged."""
    texts = [e for e in examples if e.answer and all(isinstance(item, Text) for item in e.answer)]
    drawings = [e for e in examples if e.answer and any(isinstance(item, Codes) for item in e.answer)]
    if texts:
        results.said[task] = ask_texts(generator, texts, GREEDY)
    if drawings and generator.codebook:
        results.drawn[task] = ask_drawings(generator, balanced(drawings, settings.images), settings.drawing)
    elif drawings:
        results.not_asked[task] = len(drawings)
    # The words of a document are the likeliest; guidance and the rest are the drawings', which it may hold too.
    mixed = replace(settings.drawing, temperature=GREEDY.temperature)
    if continued := ask_last_items(generator, [e for e in examples if e.answer is None], mixed):
        results.continued[task] = continued


def judged_inputs(generator: Generator, results: Results) -> list[tuple[str, Inputs]]:
    """What metrics are to judge, with the name of each; completes `results.rebuilt`."""
    judged: list[tuple[str, Inputs]] = [
        (task, Texts([x.said for x in said], [x.right for x in said])) for task, said in results.said.items()
    ]
    for task, continued in results.continued.items():
        # Whether an image is the right one to go on with is no matter of pixels: a judge of the data has to say that.
        ends = [(x.added if isinstance(x.added, str) else "", x.right) for x in continued if isinstance(x.right, str)]
        judged.append((task, Texts([added for added, _ in ends], [right for _, right in ends])))
    real, known = results.validation, generator.codes(results.train.images)
    for task, drawn in results.drawn.items():
        pairs = drawn.existing()
        images, labels = [d.pixels_HW3 for _, d in pairs], [example.label for example, _ in pairs]
        judged.append((task, ImageSets(images, labels, real.images, real.labels)))
        judged.append((task, CodeSets([d.codes for _, d in pairs], known)))
    if real.images:
        codes = generator.codes(real.images)
        results.rebuilt = generator.pixels(codes)
        judged.append(("reconstruction", ImagePairs(results.rebuilt, real.images)))
        judged.append(("validation", CodeSets(codes, known)))
    if known:
        judged.append(("training", CodedImages(known, generator.codebook)))
    return judged
