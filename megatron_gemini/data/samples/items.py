"""What documents are made of: text, codes, and items of modalities before and after they are prepared.

Shape suffixes: P encoder inputs, C values of an input.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Protocol, TypeAlias, runtime_checkable

from megatron_gemini.modalities.spec import Grid, Prepared

if TYPE_CHECKING:
    import numpy as np
    import torch


@dataclass(frozen=True)
class Text:
    """A piece of text."""

    text: str


@dataclass(frozen=True)
class Codes:
    """An item that the model makes, as codes. target: its modality, and the range of the vocabulary, of whose size each
    code is below. tokenizer: the name of what made the codes, as the sample has it; empty where it does not say."""

    target: str
    codes: tuple[int, ...]
    tokenizer: str = field(default="", compare=False)


@runtime_checkable
class RawItem(Protocol):
    """An item of a modality before it is prepared: `Image`, `Video`, `Audio` and the like, each in its own folder."""

    modality: ClassVar[str]

    @property
    def nbytes(self) -> int:
        """Memory that its values take."""
        ...


@dataclass(frozen=True, eq=False)
class EncoderInput:
    """An item of a modality as its encoder takes it. It may stand in a document in the place of the raw item.

    placeholder: the control token that stands for its embeddings. values_PC, grid, seconds: as in `contracts.Media`.
    spans: lengths of the bidirectional spans that its placeholders form; none for an item whose connector gives a
        memory, which has one causal placeholder in the stream and `memory` embeddings beside it.
    """

    modality: str
    encoder: str
    placeholder: str
    values_PC: torch.Tensor
    grid: Grid
    seconds: float
    spans: tuple[int, ...]
    memory: int = 0

    @property
    def nbytes(self) -> int:
        return self.values_PC.nbytes

    @property
    def prepared(self) -> Prepared:
        return Prepared(self.values_PC, self.grid, self.seconds)


Item: TypeAlias = Text | Codes | EncoderInput | RawItem


@dataclass(frozen=True, eq=False)
class Turn:
    """What one side of a conversation says; `answer`: the model does."""

    answer: bool
    items: Sequence[Item]


ColumnValue: TypeAlias = "bool | int | float | Sequence[float] | np.ndarray"
"""Of a document: one number for all of it, or one for each of its tokens."""


@dataclass(frozen=True, eq=False)
class Example:
    """What a task makes of a sample: the two sides of a document.

    answer: None where the whole of it is learned, as of plain text. columns: by name, what objectives may want of it
    beside its tokens (`contracts.Column`). turns: the whole conversation, where there are more of them than these two.
    """

    prompt: Sequence[Item]
    answer: Sequence[Item] | None
    columns: Mapping[str, ColumnValue] = field(default_factory=dict)
    turns: Sequence[Turn] = ()
