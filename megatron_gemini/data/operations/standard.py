"""The operations that a list begins and ends with: members to fields, fields to an example, an example to a
document; and the choice of a caption."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from megatron_gemini.contracts import TEXT
from megatron_gemini.data.operations.spec import Operation, OperationSpec, Sample, Setting
from megatron_gemini.data.samples.decode import CAPTIONS, over_items
from megatron_gemini.data.samples.document import build_example
from megatron_gemini.data.samples.form import form_example
from megatron_gemini.data.samples.prepare import prepare
from megatron_gemini.data.samples.spec import Fields

if TYPE_CHECKING:
    import numpy as np


def decode(setting: Setting) -> Operation:
    """`members` to the fields that the task needs (`SampleDecoder.fields`)."""

    def apply(sample: Sample, random: np.random.Generator) -> Sample:
        # The bytes are left behind: what is kept from one epoch to the next is the fields.
        return Sample(
            sample.key, fields=setting.decoder.fields(sample.members, sample.key, setting.schema, sample.fetch)
        )

    return apply


def prepare_items(setting: Setting) -> Operation:
    """Every item of a modality as its encoder's input."""
    encoders = setting.decoder.config.encoders
    return lambda sample, random: dataclasses.replace(
        sample, fields=over_items(sample.fields, lambda item: prepare(item, encoders))
    )


def choose_caption(setting: Setting, first: float = 0.5) -> Operation:
    """The text is the first of the sample's captions with the probability `first`, otherwise any of the others."""
    if not 0 <= first <= 1:
        raise ValueError(f"first is {first}; it is a probability")

    def apply(sample: Sample, random: np.random.Generator) -> Sample:
        captions = sample.fields.of(CAPTIONS, list) if CAPTIONS in sample.fields else []
        # Both are drawn in any case, so that what is drawn after them does not depend on the number of captions.
        take_first, other = random.random() < first, random.random()
        if len(captions) < 2 or take_first:
            return sample
        chosen = captions[1 + int(other * (len(captions) - 1))]
        return dataclasses.replace(sample, fields=Fields({**sample.fields, TEXT: chosen}))

    return apply


def form(setting: Setting, caption_dropout: float = -1.0) -> Operation:
    """The task's `example`, see `form_example`. caption_dropout: if not negative, in place of the run's."""
    if caption_dropout > 1:
        raise ValueError(f"caption_dropout is {caption_dropout}; it is a share, at most 1")
    dropout = caption_dropout if caption_dropout >= 0 else setting.caption_dropout
    task = setting.schema.task

    def apply(sample: Sample, random: np.random.Generator) -> Sample:
        example = form_example(task, sample.fields, setting.prompts, random, dropout)
        return dataclasses.replace(sample, example=example)

    return apply


def tokenize(setting: Setting) -> Operation:
    """The example as a `document`: tokens, spans, loss marks and encoder inputs."""

    def apply(sample: Sample, random: np.random.Generator) -> Sample:
        assert sample.example is not None, "format stands before tokenize"
        document = build_example(
            sample.example,
            layout=setting.layout,
            text_tokenizer=setting.text_tokenizer,
            encoders=setting.decoder.config.encoders,
            key=sample.key,
        )
        return dataclasses.replace(sample, document=document)

    return apply


DECODE = OperationSpec(decode)
PREPARE = OperationSpec(prepare_items)
CHOOSE_CAPTION = OperationSpec(choose_caption, random=True)
FORMAT = OperationSpec(form, random=True)
TOKENIZE = OperationSpec(tokenize)
