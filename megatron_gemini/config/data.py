"""Where samples come from, what is asked of each, and how they are packed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from megatron_gemini.config.check import at_least, positive
from megatron_gemini.registry import ENCODERS, FORMATS, MODALITIES, TASKS, nearest

AUTO = "auto"


@dataclass(frozen=True)
class SourceConfig:
    """One set of shards, read for one task."""

    shards: str = ""
    """Path or fsspec URL; globs, {000..015} ranges and {a,b} lists are expanded. Relative to the working directory."""
    task: str = "caption"
    """What is asked of the samples: the name of a task, see `megatron_gemini/registry.py`."""
    weight: float = 1.0
    """Share of the documents drawn from here, relative to the other sources."""
    prompts: tuple[str, ...] = ()
    """Questions to choose from (the task's own when empty). For `generate`, templates with {text}."""
    name: str = ""
    """In logs and error messages; the task and the file name when empty."""
    format: str = AUTO
    """webdataset, jsonl, parquet or a plugin's; `auto` goes by the ending of the path."""
    fields: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Where a sample has its fields, by their names: members of a tar by their endings, columns of a table, or
    MEMBER:KEY for a key of a JSON member. Of several names the first that the sample has counts. A field that is not
    named here has its usual names."""
    filters: tuple[str, ...] = ()
    """Conditions on the sample's JSON member or columns, which must all hold: similarity >= 0.3, NSFW in UNLIKELY."""
    operations: tuple[str, ...] = ()
    """What is done to a sample, in order, such as resize(tokens=256), in place of the usual list; see docs/data.md."""
    epochs: float = 0.0
    """The source drops out of the mixture after so many epochs; 0 for never."""
    tokens: int = 0
    """The source drops out of the mixture after about so many tokens; 0 for never."""

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ValueError(f"data.sources.task is {self.task!r}; {TASKS.nearest(self.task)}")
        if self.format != AUTO and self.format not in FORMATS:
            raise ValueError(f"data.sources.format is {self.format!r}; {nearest(self.format, [AUTO, *FORMATS])}")
        for name in self.fields:
            if name not in (known := field_names(self.task)):
                raise ValueError(
                    f"data.sources.fields.{name} is no field of the task {self.task}; {nearest(name, known)}"
                )
        positive(self, "data.sources", "weight")
        at_least(self, "data.sources", 0, "epochs", "tokens")


def field_names(task: str) -> list[str]:
    """Fields that a sample may have: text, every modality, their codes, and what only this task reads."""
    codes = [spec.codes.field for spec in MODALITIES.entries() if spec.codes is not None]
    return [*MODALITIES.names, *codes, *(each.name for each in TASKS.get(task).own_fields)]


@dataclass(frozen=True)
class PhaseConfig:
    """Weights of the sources from a step on."""

    step: int = 0
    weights: tuple[float, ...] = ()
    """One for each of data.sources, in their order; 0 leaves a source out."""

    def __post_init__(self) -> None:
        at_least(self, "data.curriculum", 0, "step")
        if any(weight < 0 for weight in self.weights) or not any(self.weights):
            raise ValueError(f"data.curriculum.weights is {list(self.weights)}; none below 0, and one above it")


@dataclass(frozen=True)
class DataConfig:
    """The training mixture and the packing of its documents into rows."""

    sources: tuple[SourceConfig, ...] = ()
    validation: tuple[SourceConfig, ...] = ()
    """Sources of the validation loss; never trained on."""
    text_model: str = ""
    """SentencePiece model file."""
    row_tokens: int = 1024
    """T: tokens of a packed row, one microbatch."""
    lanes: int = 0
    """Independent streams of rows, which all ranks of a job share out; the order of samples depends on their number but
    never on ranks. Each keeps look_ahead decoded documents. 0 takes four times train.rows_per_step, see `usual_lanes`;
    a checkpoint holds the number that was taken."""
    look_ahead: int = 16
    """Documents of a lane that the packer may choose from."""
    row_inputs: Mapping[str, int] = field(default_factory=dict)
    """Most inputs (patches, log-mel frames) of each encoder in a row, by its name, to bound the encoders' memory; 0, or
    no entry, for no limit but row_tokens."""
    temperature: float = 1.0
    """Weights are raised to 1 / temperature: above 1 they come closer to each other."""
    curriculum: tuple[PhaseConfig, ...] = ()
    """Weights that take the place of the sources' own from a step on."""
    caption_dropout: float = 0.1
    """Share of image-generating prompts left empty, for classifier-free guidance."""
    max_bad_share: float = 0.05
    """Stop when more than this share of the samples read is unreadable (after the first 200 samples)."""
    prefetch: int = 2
    """Global steps that a background thread reads ahead; 0 reads in the training loop."""
    workers: int = 0
    """Processes of a rank that read and decode; 0 does it in the rank's own process."""
    sample_seconds: float = 60.0
    """A sample that takes a worker process longer, its reading aside, is given up, counted and never tried again."""
    cache_bytes: int = 256 * 1024 * 1024
    """Memory of a rank for decoded samples, so that small data sets are decoded once, not once an epoch; 0 for none."""

    def __post_init__(self) -> None:
        positive(self, "data", "row_tokens", "look_ahead", "sample_seconds")
        at_least(self, "data", 0, "lanes", "caption_dropout", "max_bad_share", "prefetch", "workers", "cache_bytes")
        for name in ("caption_dropout", "max_bad_share"):
            if getattr(self, name) > 1:
                raise ValueError(f"data.{name} is {getattr(self, name)}; it is a share, at most 1")
        for name, limit in self.row_inputs.items():
            if name not in ENCODERS:  # a bound that bounds nothing would pass unseen until memory runs out
                raise ValueError(f"data.row_inputs.{name} is of no encoder; {ENCODERS.nearest(name)}")
            if limit < 0:
                raise ValueError(f"data.row_inputs.{name} is {limit}; it must be 0 or more")
        positive(self, "data", "temperature")
        self._check_curriculum()

    def _check_curriculum(self) -> None:
        steps = [phase.step for phase in self.curriculum]
        if steps != sorted(set(steps)):
            raise ValueError(f"data.curriculum begins phases at the steps {steps}; put them in increasing order")
        for phase in self.curriculum:
            if len(phase.weights) != len(self.sources):
                raise ValueError(
                    f"data.curriculum gives {len(phase.weights)} weights from step {phase.step} on, and there are "
                    f"{len(self.sources)} data.sources; give one for each"
                )
