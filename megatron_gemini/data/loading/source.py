"""One source of documents: its shards, its task, and an order that depends on (seed, source, epoch) alone."""

from __future__ import annotations

import contextlib
from collections import Counter
from functools import partial
from pathlib import Path

from megatron_gemini.config.data import SourceConfig
from megatron_gemini.config.run import RunConfig
from megatron_gemini.config.schema import Plain
from megatron_gemini.contracts import TokenLayout
from megatron_gemini.data.loading.order import Order
from megatron_gemini.data.operations.pipeline import OperationPipeline
from megatron_gemini.data.operations.spec import Sample, Setting
from megatron_gemini.data.packing.pack import check_fits, row_limits
from megatron_gemini.data.random_stream import random_stream
from megatron_gemini.data.samples.decode import MissingField, SampleDecoder, codes_in, field_bytes
from megatron_gemini.data.samples.decode_json import decode_json
from megatron_gemini.data.samples.document import Document, Encodes
from megatron_gemini.data.samples.form import check_prompts
from megatron_gemini.data.samples.kinds import made_as
from megatron_gemini.data.samples.spec import TaskSpec
from megatron_gemini.data.sources.attachments import read_named
from megatron_gemini.data.sources.columns import RECORD
from megatron_gemini.data.sources.records import open_records
from megatron_gemini.data.sources.schema import Schema
from megatron_gemini.data.sources.storage import patiently
from megatron_gemini.data.sources.table import Table
from megatron_gemini.modalities.bad_sample import BadSample, guarded
from megatron_gemini.registry import MODALITIES, TASKS

CHECKED_RECORDS = 16  # of a source, whose fields are compared with what is read
CHECKED_SHARDS = 64  # at the start of a run; what is wrong with others is found when they are read


def source_labels(sources: tuple[SourceConfig, ...]) -> list[str]:
    """A distinct name of every source, for logs, states and random streams. Raises ValueError for a name used twice."""
    labels = [source.name or f"{source.task}:{source.shards.rsplit('/', 1)[-1]}" for source in sources]
    # A label is a key of random streams and of states: two sources of one would draw alike and mix their counts.
    twice = [label for label, count in Counter(labels).items() if count > 1]
    if twice:
        raise ValueError(f"two data sources are called {twice[0]!r}; give each its own data.sources name")
    return labels


class Cache:
    """Decoded samples up to a number of bytes, never evicted.

    Every epoch reads all samples in a new order, so whatever is kept is worth the same, and replacing only costs.
    """

    def __init__(self, limit: int) -> None:
        self.left = limit
        self.samples: dict[tuple[str, int], Sample] = {}
        """By (label of the source, number)."""

    def put(self, label: str, number: int, sample: Sample) -> None:
        # Never more than the limit, and nothing in the place of anything: see the class.
        cost = sum(map(field_bytes, sample.fields.values()))
        if cost <= self.left:
            self.left -= cost
            self.samples[label, number] = sample


class DocumentSource:
    """Documents by position in an endless sequence of epochs; position p is in epoch p // len(source).

    Raises ValueError for shards that are missing or empty, naming the shard.
    """

    def __init__(
        self,
        source: SourceConfig,
        label: str,
        config: RunConfig,
        layout: TokenLayout,
        text_tokenizer: Encodes,
        cache: Cache,
        caption_dropout: float,
    ) -> None:
        task = TASKS.get(source.task)
        check_prompts(task, source.prompts, label)
        _check_settings(task, label, config)
        self.label, self.task, self.seed = label, source.task, config.train.seed
        self.weight, self.epochs, self.tokens = source.weight, source.epochs, source.tokens
        self.limits, self.cache = row_limits(config.data), cache
        try:
            self.schema = Schema.of(source)
            decoder = SampleDecoder(config)
            setting = Setting(decoder, self.schema, layout, text_tokenizer, source.prompts, caption_dropout)
            self.pipeline = OperationPipeline(source.operations, setting)
        except ValueError as error:
            raise ValueError(f"the data source {label!r}: {error}") from None
        self.names = self.schema.members()
        # Indices go into the run's folder, which is there to be written to and is seen by all ranks.
        self.shards = open_records(source, self.names, Path(config.train.output_dir) / "shard-index")
        self.makers: dict[tuple[str, str], str] = {}
        """A shard for each (modality, name of the tokenizer that made codes of it) that `check_shards` met."""
        self.order = Order(self.shards.bounds, self.seed, label, self.shards.window)

    def __len__(self) -> int:
        return len(self.shards)

    def document(self, position: int) -> Document:
        """The document at a position. Raises BadSample."""
        epoch, sample = self.order.at(position)
        key = self.shards.key(sample)
        # Keyed by the sample and not by its position: a source with other samples beside it asks this one the same.
        random = random_stream(self.seed, "prompt", self.label, epoch, key)
        document = self.pipeline.document(self.sample(sample), random)
        check_fits(document, self.limits)
        return document

    def sample(self, number: int) -> Sample:
        """What a sample is in every epoch, from the cache if it is there. Raises BadSample, FilteredSample."""
        sample = self.cache.samples.get((self.label, number))
        if sample is None:
            key = f"{self.label}/{self.shards.key(number)}"
            with guarded("read", key):
                # The built-in formats are patient themselves; a plugin's may read in any way.
                read = partial(self.shards.read, number, self.names)
                members = patiently(read, self.shards.path(number), trouble=OSError)
                self.schema.check(members)
            try:
                sample = self.pipeline.fixed(Sample(key, members, partial(read_named, self.shards, number)))
            except MissingField as error:
                raise BadSample(error.reason, f"{error}; {self._there(number)}") from None
            self.cache.put(self.label, number, sample)
        return sample

    def _there(self, number: int) -> str:
        """What a sample has in place of a field that it lacks, in words."""
        found = self.shards.columns(number) if isinstance(self.shards, Table) else self.shards.endings(number)
        cut = any(name.rpartition(".")[2] in self.names and name not in self.names for name in found)
        hint = " (a sample's key ends at the first dot of the file's name)" if cut else ""
        return f"it has {', '.join(found)[:120] or 'nothing'}{hint}"

    def unread_fields(self) -> list[str]:
        """Names that descriptions of documents or conversations have and nothing reads, found in some of the records.

        A field that names media in a way of its own would otherwise be left out in silence. A number names none.
        """
        described = [field for field in self.schema.task.own_fields if field.keys and RECORD in field.members]
        read = {name for field in described for name in (*field.keys, *field.reads())}
        read |= {condition.name for condition in self.schema.conditions}
        found: dict[str, None] = {}
        numbers = range(0, len(self), -(-len(self) // CHECKED_RECORDS)) if described and RECORD in self.names else ()
        for number in numbers:
            with contextlib.suppress(BadSample), guarded("read", self.label):
                record = decode_json(self.shards.read(number, [RECORD]).get(RECORD, b"null"))
                fields = record.items() if isinstance(record, dict) else ()
                found |= dict.fromkeys(name for name, value in fields if _holds_text(value))
        return [name for name in found if name not in read]

    def check_shards(self) -> None:
        """Raise ValueError for a shard in which no sample can be used: any, or of many one of `CHECKED_SHARDS` evenly
        spread ones. Fills `makers` from their first usable samples."""
        # The first usable sample is proof enough: it is the wrong field or a wrong file that is to be found here.
        bounds = [*self.shards.first_sample, len(self)]
        for number in range(0, len(self.shards.paths), -(-len(self.shards.paths) // CHECKED_SHARDS)):
            path, first, end = self.shards.paths[number], bounds[number], bounds[number + 1]
            reasons: Counter[str] = Counter()
            for sample in range(first, end):
                try:
                    for value in self.sample(sample).fields.values():
                        for codes in codes_in(value):
                            self.makers.setdefault((codes.target, codes.tokenizer), path)
                    break
                except BadSample as error:
                    reasons[error.reason] += 1
                    last = error
            else:
                found = ", ".join(f"{reason}: {count}" for reason, count in reasons.most_common())
                raise ValueError(
                    f"no sample of {path!r} can be used for {self.task} ({found}); the last one: {last}"
                ) from last


def _holds_text(value: Plain) -> bool:
    if isinstance(value, (list, dict)):
        return any(map(_holds_text, value.values() if isinstance(value, dict) else value))
    return isinstance(value, str)


def _check_settings(task: TaskSpec, label: str, config: RunConfig) -> None:
    """Raise ValueError for a task that needs an encoder, or codes, that the run does not have."""
    for name in task.field_names:
        encoder = MODALITIES.get(name).encoder if name in MODALITIES else ""
        if encoder and not config.encoders[encoder].enabled:
            raise ValueError(
                f"the data source {label!r} ({task.name}) needs encoders.{encoder}.enabled; enable it or leave the "
                "source out"
            )
        made = made_as(name)
        if made is not None and not made[1].size(config):
            raise ValueError(
                f"the data source {label!r} ({task.name}) has items of {made[0].name} to make, and {made[1].setting} "
                "is 0; set it to the tokenizer's codebook size or leave the source out"
            )
