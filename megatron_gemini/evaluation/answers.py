"""Answers in text, beside what is right."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_gemini.data.samples.items import Codes, Item, Text
from megatron_gemini.evaluation.images import Classifier, share
from megatron_gemini.evaluation.validation import Example
from megatron_gemini.generation.api import Answer, Drawing, Generator
from megatron_gemini.generation.settings import SampleSettings


def said_and_right(
    generator: Generator, examples: Sequence[Example], settings: SampleSettings
) -> list[tuple[str, str]]:
    """What the model says to every example, and what is right."""
    answers = generator.respond_all([example.prompt for example in examples], settings)
    return [(_text(answer), text_of(example.answer or [])) for answer, example in zip(answers, examples, strict=True)]


def accuracy(pairs: Sequence[tuple[str, str]]) -> float:
    """Share of answers that are the right text, but for case, spaces and a closing mark."""
    return share(normalized(said) == normalized(right) for said, right in pairs)


def normalized(text: str) -> str:
    return " ".join(text.lower().split()).rstrip(".!?")


def text_of(items: Sequence[Item]) -> str:
    return "".join(item.text for item in items if isinstance(item, Text))


def last_item_accuracy(
    generator: Generator, examples: Sequence[Example], settings: SampleSettings, classifier: Classifier | None
) -> float:
    """Share of interleaved documents whose last item the model adds as it should, given all items before it.

    A text has to be the same (`accuracy`); an image has to be recognized as what the document's own image is
    recognized as. Documents that end in an image are left out without a classifier.
    """
    kept = [e for e in examples if isinstance(e.prompt[-1], Text if classifier is None else (Text, Codes))]
    documents = [generator.open_stream(example.prompt[:-1], example.key) for example in kept]
    answers = generator.continue_all(documents, settings)
    return share(
        _continues(generator, answer, example.prompt[-1], classifier)
        for answer, example in zip(answers, kept, strict=True)
    )


def _continues(generator: Generator, answer: Answer, right: Item, classifier: Classifier | None) -> bool:
    first = answer[0] if answer else ""
    if isinstance(right, Codes):
        assert classifier is not None
        if not isinstance(first, Drawing):
            return False
        drawn, real = classifier.recognise([first.pixels_HW3, generator.pixels([right.codes])[0]])
        return drawn == real
    return isinstance(first, str) and normalized(first) == normalized(text_of([right]))


def _text(answer: Answer) -> str:
    return "".join(piece for piece in answer if isinstance(piece, str))
