"""Asking a model what the validation data asks, and what it answers: texts, drawings, documents' last items."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from megatron_gemini.data.samples.items import Codes, Item, Text
from megatron_gemini.evaluation.validation import ValidationExample, some
from megatron_gemini.generation.api import Drawing, Generator, Piece
from megatron_gemini.generation.settings import SampleSettings


class Said(NamedTuple):
    """What the model said to an example, and what is right."""

    example: ValidationExample
    said: str
    right: str


class Continued(NamedTuple):
    """What the model added to an interleaved document (None: nothing), and the document's own last piece."""

    example: ValidationExample
    added: Piece | None
    right: Piece


@dataclass
class Drawn:
    """What came of prompts for images; None where the answer held no image."""

    examples: list[ValidationExample]
    drawings: list[Drawing | None]

    def existing(self) -> list[tuple[ValidationExample, Drawing]]:
        pairs = zip(self.examples, self.drawings, strict=True)
        return [(example, drawing) for example, drawing in pairs if drawing is not None]


def text_of(items: Sequence[Item]) -> str:
    return "".join(item.text for item in items if isinstance(item, Text))


def ask_texts(generator: Generator, examples: Sequence[ValidationExample], settings: SampleSettings) -> list[Said]:
    """What the model says to every example; images in its answers are passed over."""
    answers = generator.respond_all([example.prompt for example in examples], settings)
    said = ("".join(piece for piece in answer if isinstance(piece, str)) for answer in answers)
    # An answer is judged as one text, where an image stands between two parts of it too.
    return [Said(e, text, text_of(e.answer or [])) for e, text in zip(examples, said, strict=True)]


def ask_drawings(generator: Generator, examples: Sequence[ValidationExample], settings: SampleSettings) -> Drawn:
    """The first image of every answer."""
    answers = generator.respond_all([example.prompt for example in examples], settings)
    return Drawn(list(examples), [next((p for p in a if isinstance(p, Drawing)), None) for a in answers])


def ask_last_items(
    generator: Generator, examples: Sequence[ValidationExample], settings: SampleSettings
) -> list[Continued]:
    """What the model adds to every interleaved document that lacks its last item.

    Left out are documents of one item, which nothing precedes, and those that end in an image if the model cannot draw.
    """
    kinds = (Text, Codes) if generator.codebook else (Text,)
    kept = [example for example in examples if len(example.prompt) > 1 and isinstance(example.prompt[-1], kinds)]
    documents = [generator.open_document(example.prompt[:-1], example.key, roles=False) for example in kept]
    answers = generator.continue_all(documents, settings)
    ends = [example.prompt[-1] for example in kept]
    images = iter(generator.pixels([end.codes for end in ends if isinstance(end, Codes)]))
    rights = [Drawing(end.codes, next(images)) if isinstance(end, Codes) else text_of([end]) for end in ends]
    # Only the next piece counts: what a model goes on to say behind it was not asked.
    return [Continued(e, a[0] if a else None, right) for e, a, right in zip(kept, answers, rights, strict=True)]


def balanced(examples: Sequence[ValidationExample], count: int) -> list[ValidationExample]:
    """About `count` examples, equally many of every class; they repeat where a class has too few.

    Where there are more classes than `count`, one example each of some that are spread over all.
    """
    # A class that most prompts ask for would otherwise decide the figure. A prompt that repeats has another seed.
    by_class: dict[str, list[ValidationExample]] = defaultdict(list)
    for example in examples:
        by_class[example.label].append(example)
    chosen = some(sorted(by_class), count)
    each = max(count // max(len(chosen), 1), 1)
    return [by_class[label][i % len(by_class[label])] for label in chosen for i in range(each)]
