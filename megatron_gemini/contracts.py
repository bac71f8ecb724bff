"""What data, models and training share: token ids, spans, and the packed row.

Shape suffixes: T packed tokens, P encoder input rows (image patches or log-mel frames), C values an input
row, I items (images, clips of frames, audio clips), O encoder output embeddings.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

# The order is part of every checkpoint: append only.
CONTROL_TOKENS = (
    "pad",  # fills the end of a row; never attended to, never a target
    "bos",  # begins every document
    "eos",  # ends every document, and every answer of a conversation
    "user",  # begins a prompt
    "model",  # begins an answer
    "image",  # placeholder: one embedding of an input image
    "video",  # placeholder: one embedding of a frame of an input clip
    "audio",  # placeholder: one embedding of an input audio clip
    "image_begin",  # begins a run of image codes, the output image
    "image_end",  # ends it
    *(f"reserved_{i}" for i in range(6)),
)

TEXT = "text"  # the kind of target that text and control tokens are; others are the ranges of codes


@dataclass(frozen=True)
class TokenLayout:
    """Disjoint id ranges of the one vocabulary: text pieces, then control tokens, then named ranges of codes.

    codes: (name, number of codes) of every range, in order; another one can be added behind those that are there.
    """

    text_size: int
    codes: tuple[tuple[str, int], ...] = ()

    def __post_init__(self) -> None:
        if self.text_size < 1:
            raise ValueError(f"text_size is {self.text_size}; a vocabulary needs at least one text piece")
        for name, count in self.codes:
            if count < 0:
                raise ValueError(f"the number of {name} codes is {count}; use 0 for a model that makes none")

    @property
    def size(self) -> int:
        """Number of ids, without any padding for tensor parallelism."""
        return self.text_size + len(CONTROL_TOKENS) + sum(count for _, count in self.codes)

    @property
    def targets(self) -> tuple[str, ...]:
        """Kinds of target token: text (with the control tokens), then the ranges of codes. `Batch.modality_T` numbers
        them."""
        return (TEXT, *(name for name, _ in self.codes))

    def control(self, name: str) -> int:
        """Id of a control token, by its name in `CONTROL_TOKENS`."""
        return self.text_size + CONTROL_TOKENS.index(name)

    def code_range(self, name: str) -> range:
        """Ids of the codes of a range; empty where the layout has no such range."""
        first = self.text_size + len(CONTROL_TOKENS)
        for known, count in self.codes:
            if known == name:
                return range(first, first + count)
            first += count
        return range(0)

    def is_text(self, token: int) -> bool:
        return 0 <= token < self.text_size


@dataclass(frozen=True)
class Column:
    """A column that an objective adds to documents and rows, beside those of `Batch`.

    name: of the field in `Batch.columns`. per: "token" (of the token itself), "target" (of the token that a position
    predicts: shifted by one, as `Batch.target_T`) or "document". dtype: torch's name of it. fill: the value of padding,
    and of documents that do not have the column.
    """

    name: str
    per: Literal["token", "target", "document"]
    dtype: Literal["float32", "int64", "int32", "int8", "bool"] = "float32"
    fill: float = 0.0


@dataclass(frozen=True)
class RowFormat:
    """What an objective wants of a packed row. target_weights: loss weight by kind of target, 1 for one not named."""

    columns: tuple[Column, ...] = ()
    target_weights: Mapping[str, float] = field(default_factory=dict)

    def weight(self, target: str) -> float:
        return self.target_weights.get(target, 1.0)

    def check(self, layout: TokenLayout) -> None:
        """Raise a ValueError for the weight of a kind of target that there is not: it would weigh nothing, unseen."""
        for name in self.target_weights:
            if name not in layout.targets:
                raise ValueError(
                    f"the loss weight of {name} is of no kind of target; there are {', '.join(layout.targets)}"
                )


@dataclass
class Media:
    """Inputs of one encoder for one packed row: its items back to back, in the order of their placeholders.

    values_PC: float32, P inputs of C values, as the encoder takes them (its spec says what they are).
    grid_I3: int64, the three sizes of an item, whose product is its number of inputs (unused ones are 1).
    time_I: float32, seconds between two steps along the grid's first axis; 0 where that is not time.
    token_O: int64, position in the row T of the token that each of the item's embeddings belongs to.
    """

    values_PC: torch.Tensor
    grid_I3: torch.Tensor
    time_I: torch.Tensor
    token_O: torch.Tensor

    @property
    def items(self) -> int:
        return self.grid_I3.shape[0]

    def to(self, device: torch.device | str) -> Media:
        """The same inputs on `device`."""
        return Media(*(getattr(self, f.name).to(device, non_blocking=True) for f in dataclasses.fields(self)))


@dataclass
class Batch:
    """One microbatch: one packed row of T tokens that holds whole documents.

    token_T, target_T, position_T: int64. target_T[i] is the token that position i predicts (its document's next);
        position_T counts from 0 in each document.
    weight_T: float32, the loss weight of target_T (0: prompt, placeholder, last token of a document, padding);
        the modality's own loss weight is already multiplied in.
    segment_T: int32, document id from 1; 0 is padding, and only at the end of the row.
    span_T: int32, 0 for a causal token, otherwise the id of a bidirectional span (unique in the row).
        Token i attends to token j iff segment_T[i] == segment_T[j] != 0 and
        (j <= i or span_T[i] == span_T[j] != 0).
    modality_T: int8, kind of target_T, a place in `TokenLayout.targets`.
    columns: what the objective adds, by name: [T] per token or target, [documents] per document (`RowFormat`).
    media: inputs by encoder name; an encoder without an item in this row is absent.
    samples: keys of the documents, in order, for error messages and tests.
    """

    token_T: torch.Tensor
    target_T: torch.Tensor
    weight_T: torch.Tensor
    position_T: torch.Tensor
    segment_T: torch.Tensor
    span_T: torch.Tensor
    modality_T: torch.Tensor
    columns: dict[str, torch.Tensor] = field(default_factory=dict)
    media: dict[str, Media] = field(default_factory=dict)
    samples: list[str] = field(default_factory=list)

    def to(self, device: torch.device | str) -> Batch:
        """The same row with every tensor on `device`."""
        moved = {
            f.name: getattr(self, f.name).to(device, non_blocking=True)
            for f in dataclasses.fields(self)
            if f.name.endswith("_T")
        }
        columns = {name: column.to(device, non_blocking=True) for name, column in self.columns.items()}
        media = {name: inputs.to(device) for name, inputs in self.media.items()}
        return Batch(**moved, columns=columns, media=media, samples=self.samples)

    def without_media(self) -> Batch:
        """The same row without the inputs of its encoders."""
        return dataclasses.replace(self, media={})

    def without_values(self) -> Batch:
        """The same row with the sizes and places of its media, but none of their values: `values_PC` is [0, C]."""
        media = {name: dataclasses.replace(each, values_PC=each.values_PC[:0]) for name, each in self.media.items()}
        return dataclasses.replace(self, media=media)


@dataclass(frozen=True)
class StepRows:
    """What a rank has of the packed rows of a global step, all on the CPU.

    Row n belongs to data-parallel rank n mod data_size. Its tokens are with all ranks of that data-parallel rank. The
    values of its media are with the one rank of the world that has read it.

    rows: those of this rank's data-parallel rank, in order; not all of them if a rank could not read. The values of
        their media may be missing (`Batch.without_values`).
    read: by number, the rows that this rank has read, with the values of their media.
    readers: of every row, the rank that has read it; -1 for a row that is missing.
    """

    rows: list[Batch]
    read: dict[int, Batch]
    readers: list[int]
