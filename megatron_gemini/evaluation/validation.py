"""What the shards hold, read for evaluation: questions with their right answers, and real images with their classes.

Shape suffixes: S pixels of a side.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
from PIL import Image

from megatron_gemini.config.data import SourceConfig
from megatron_gemini.contracts import TEXT
from megatron_gemini.data.random_stream import random_stream
from megatron_gemini.data.samples.captions import captions
from megatron_gemini.data.samples.decode import SampleDecoder
from megatron_gemini.data.samples.form import form_example
from megatron_gemini.data.samples.items import Item
from megatron_gemini.data.samples.references import Fetch, named_item, read_reference
from megatron_gemini.data.sources.attachments import read_named
from megatron_gemini.data.sources.columns import RECORD
from megatron_gemini.data.sources.records import open_records
from megatron_gemini.data.sources.schema import Schema
from megatron_gemini.evaluation.json_data import parse_object
from megatron_gemini.evaluation.metrics.inputs import ImageHW3
from megatron_gemini.evaluation.separation import Fingerprint
from megatron_gemini.generation.code_runs import drawn_modalities
from megatron_gemini.modalities.bad_sample import BadSample, guarded
from megatron_gemini.registry import MODALITIES

Anything = TypeVar("Anything")


@dataclass(frozen=True, eq=False)
class ValidationExample:
    """A question and what is right. answer: None for a document that is learned whole (interleave, text).

    text: the sample's own text, empty if it has none. label: its class, see `label_of`.
    """

    key: str
    prompt: list[Item]
    answer: list[Item] | None
    text: str
    label: str


@dataclass
class RealImages:
    """Images of one size, uint8[S, S, 3], their classes, and which of them are altered copies of others."""

    images: list[ImageHW3]
    labels: list[str]
    augmented: list[bool]

    def originals(self) -> RealImages:
        """Those that are as they were found."""
        kept = [i for i, altered in enumerate(self.augmented) if not altered]
        return RealImages([self.images[i] for i in kept], [self.labels[i] for i in kept], [False] * len(kept))


def read_examples(
    source: SourceConfig, decoder: SampleDecoder, limit: int, seed: int, skipped: Counter[str]
) -> list[ValidationExample]:
    """At most `limit` samples of a source, evenly spaced, each asked once; unreadable ones are counted in `skipped`."""
    schema = Schema.of(source)
    # The text beside what the task needs: where there is no label, it is what a sample is called by.
    names = list(dict.fromkeys([*schema.members(), *schema.members(TEXT), RECORD]))
    records = open_records(source, names)
    examples = []
    for sample in spaced(len(records), limit):
        key = records.key(sample)
        try:
            # Members, schema and decoding are training's: the model is asked what it would have been trained on.
            with guarded("decode", key):
                members = records.read(sample, names)
                schema.check(members)
                fields = decoder.decode(members, key, schema, partial(read_named, records, sample))
                text, label = text_of(members, schema), label_of(members, schema)
                # By the key and not by the place, so that a limit changes which samples are asked and not what they are
                # asked.
                random = random_stream(seed, "evaluate", source.task, key)
                asked = form_example(schema.task, fields, source.prompts, random)
        except BadSample as error:
            skipped[error.reason] += 1
            continue
        answer = None if asked.answer is None else list(asked.answer)
        examples.append(ValidationExample(key, list(asked.prompt), answer, text, label))
    return examples


def read_images(sources: Sequence[SourceConfig], side: int, limit: int) -> RealImages:
    """Images that have a class, from the sources' shards, at most `limit` of every set of shards, resized to `side`."""
    real = RealImages([], [], [])
    spec = MODALITIES.get(drawn_modalities()[0])
    assert spec.codes is not None and spec.preview is not None, spec.name
    kinds = {spec.name, spec.codes.field}
    named = [
        source for source in sources if TEXT in (fields := Schema.of(source).task.field_names) and kinds & {*fields}
    ]
    # A set of shards that two tasks read is read once.
    for source in {source.shards: source for source in named}.values():
        schema = Schema.of(source)
        wanted = list(dict.fromkeys([*schema.members(spec.name, TEXT), RECORD]))
        records = open_records(source, wanted)
        for sample in spaced(len(records), limit):
            try:
                with guarded("decode", records.key(sample)):
                    members = records.read(sample, wanted)
                    data = file_of(spec.name, schema, members, partial(read_named, records, sample))
                    if data is not None and (label := label_of(members, schema)):
                        real.images.append(resized(spec.preview(data), side))
                        real.labels.append(label)
                        real.augmented.append(parse_object(members.get("json", b"")).get("augmented") is True)
            except BadSample:
                continue  # the loader counts and reports these; here an image less changes nothing
    return real


def read_fingerprint(sources: Iterable[SourceConfig], names: Sequence[str], limit: int) -> Fingerprint:
    """The content of the sources' shards, at most `limit` samples of every set of shards."""
    fingerprint = Fingerprint()
    for source in {source.shards: source for source in sources}.values():
        records = open_records(source, [RECORD])
        for sample in spaced(len(records), limit):
            try:
                members = records.read(sample, records.endings(sample))
            except BadSample:
                continue
            fingerprint.add(records.key(sample), members, names)
    return fingerprint


def file_of(modality: str, schema: Schema, members: dict[str, bytes], fetch: Fetch) -> bytes | None:
    """The file of a sample's item of a modality; None if it has none. Raises BadSample."""
    found = schema.find(modality, members)
    name = named_item(found[0][1]) if found else ""
    return read_reference(name, fetch) if name else found[0][1] if found else None


def label_of(members: dict[str, bytes], schema: Schema) -> str:
    """The class of a sample: "label" in its metadata, otherwise its text; empty when it has neither."""
    label = parse_object(members.get("json", b"")).get("label")
    return str(label) if isinstance(label, (str, int)) else text_of(members, schema)


def text_of(members: dict[str, bytes], schema: Schema) -> str:
    """The first text of a sample, where its source says that it is; or an empty one."""
    try:
        return next(iter(captions(schema.find(TEXT, members))), "")
    except BadSample:  # of a task that reads no text, which may be anything; another has raised it before
        return ""


def spaced(size: int, limit: int) -> Iterator[int]:
    """At most `limit` indices below `size`, evenly spaced from the first to the last."""
    # Not the first ones: shards are often sorted, by class or by source.
    return iter(np.linspace(0, size - 1, min(size, limit)).astype(int).tolist())


def some(items: Sequence[Anything], count: int) -> list[Anything]:
    """At most `count` of the items, evenly spaced."""
    return [items[i] for i in spaced(len(items), count)]


def resized(image_HW3: ImageHW3, side: int) -> ImageHW3:
    """uint8[side, side, 3]; an image of that size unchanged."""
    if image_HW3.shape[:2] == (side, side):
        return image_HW3
    return np.asarray(Image.fromarray(image_HW3).resize((side, side), Image.Resampling.BICUBIC))
