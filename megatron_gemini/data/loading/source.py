"""One source of documents: its shards, its task, and an order that depends on (seed, source, epoch) alone."""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

from megatron_gemini.config.data import SourceConfig
from megatron_gemini.config.run import RunConfig
from megatron_gemini.contracts import TokenLayout
from megatron_gemini.data.loading.order import Order
from megatron_gemini.data.operations.pipeline import OperationPipeline
from megatron_gemini.data.operations.registry import Setting
from megatron_gemini.data.packing.pack import check_fits, row_limits
from megatron_gemini.data.samples.decode import SampleDecoder, field_bytes
from megatron_gemini.data.samples.document import Document, Encodes
from megatron_gemini.data.samples.tasks import check_prompts, random_stream
from megatron_gemini.data.sources.attachments import read_named
from megatron_gemini.data.sources.records import open_records
from megatron_gemini.data.sources.schema import TASK_FIELDS, Schema
from megatron_gemini.modalities.bad_sample import BadSample
from megatron_gemini.registry import MODALITIES

CHECKED_SHARDS = 64  # at the start of a run; what is wrong with others is found when they are read


def source_labels(sources: tuple[SourceConfig, ...]) -> list[str]:
    """A distinct name of every source, for logs, states and random streams. Raises ValueError for a name used twice."""
    labels = [source.name or f"{source.task}:{source.shards.rsplit('/', 1)[-1]}" for source in sources]
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
        self._fields: dict[tuple[str, int], dict[str, Any]] = {}

    def get(self, label: str, sample: int) -> dict[str, Any] | None:
        return self._fields.get((label, sample))

    def put(self, label: str, sample: int, fields: dict[str, Any]) -> None:
        cost = sum(map(field_bytes, fields.values()))
        if cost <= self.left:
            self.left -= cost
            self._fields[label, sample] = fields


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
        check_prompts(source.task, source.prompts, label)
        _check_encoders(source.task, label, config)
        self.label, self.task, self.seed = label, source.task, config.train.seed
        self.weight, self.epochs, self.tokens = source.weight, source.epochs, source.tokens
        self.limits, self.cache = row_limits(config.data), cache
        try:
            self.schema = Schema.of(source)
            decoder = SampleDecoder.from_config(config)
            setting = Setting(
                source.task, decoder, self.schema, layout, text_tokenizer, source.prompts, caption_dropout
            )
            self.pipeline = OperationPipeline(source.operations, setting)
        except ValueError as error:
            raise ValueError(f"the data source {label!r}: {error}") from None
        self.names = self.schema.members(source.task)
        self.shards = open_records(source, self.names, Path(config.train.output_dir) / "shard-index")
        self.order = Order(self.shards.bounds, self.seed, label, self.shards.window)

    def __len__(self) -> int:
        return len(self.shards)

    def sample_at(self, position: int) -> tuple[int, int]:
        """(epoch, sample) of a position; every epoch has an order of its own of all samples."""
        return self.order.at(position)

    def document(self, position: int) -> Document:
        """The document at a position. Raises BadSample."""
        epoch, sample = self.sample_at(position)
        key = self.shards.keys[sample]
        random = random_stream(self.seed, "prompt", self.label, epoch, key)
        document = self.pipeline.document(self.fields(sample), random)
        check_fits(document, self.limits)
        return document

    def fields(self, sample: int) -> dict[str, Any]:
        """What the sample is in every epoch, from the cache if it is there. Raises BadSample, FilteredSample."""
        fields = self.cache.get(self.label, sample)
        if fields is None:
            members = self.shards.read(sample, self.names)
            self.schema.check(members)
            key = f"{self.label}/{self.shards.keys[sample]}"
            fields = self.pipeline.fixed(
                {"key": key, "members": members, "fetch": partial(read_named, self.shards, sample)}
            )
            self.cache.put(self.label, sample, fields)
        return fields

    def check_shards(self) -> None:
        """Raise ValueError for a shard in which no sample can be used: any, or of many one of `CHECKED_SHARDS` evenly
        spread ones."""
        bounds = [*self.shards.first_sample, len(self)]
        for number in range(0, len(self.shards.paths), -(-len(self.shards.paths) // CHECKED_SHARDS)):
            path, first, end = self.shards.paths[number], bounds[number], bounds[number + 1]
            reasons: Counter[str] = Counter()
            for sample in range(first, end):
                try:
                    self.fields(sample)
                    break
                except BadSample as error:
                    reasons[error.reason] += 1
                    last = error
            else:
                found = ", ".join(f"{reason}: {count}" for reason, count in reasons.most_common())
                raise ValueError(f"no sample of {path!r} can be used for {self.task} ({found}); the last one: {last}")


def _check_encoders(task: str, label: str, config: RunConfig) -> None:
    for name in TASK_FIELDS[task]:
        encoder = MODALITIES.get(name).encoder if name in MODALITIES else ""
        if encoder and not config.encoders[encoder].enabled:
            raise ValueError(
                f"the data source {label!r} ({task}) needs encoders.{encoder}.enabled; enable it or leave the source out"
            )
        if name == "codes" and not config.image_tokenizer.codes:
            raise ValueError(
                f"the data source {label!r} ({task}) has images to draw, and image_tokenizer.codes is 0; "
                "set it to the image tokenizer's codebook size or leave the source out"
            )
