"""What a modality and an encoder are: all that data, planner, exchange, metrics and generation know of them.

Everything here can be imported without torch and without a media library: the functions of a spec import what they need
when they are called. images and clips are two modalities of one encoder; text has none.

Shape suffixes: I items, P encoder inputs, C values of an input, S spans.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, Protocol, TypeAlias, TypeVar

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import nn

    from megatron_gemini.config.run import RunConfig
    from megatron_gemini.contracts import Media

Settings = TypeVar("Settings")
RawItem = TypeVar("RawItem")
Grid: TypeAlias = tuple[int, int, int]
"""Sizes of an item, whose product is its number of inputs; see `contracts.Media`."""


class Built(Protocol):
    """What an encoder's `build` gives, beside being an `nn.Module`."""

    def __call__(self, media: Media) -> torch.Tensor:
        """[outputs, width], the embeddings of all items, in their order."""
        ...


@dataclass(frozen=True)
class EncoderSpec(Generic[Settings]):
    """An encoder: inputs of items (patches, frames of sound) in, embeddings out.

    section: the dataclass of its settings, a `config.encoders.EncoderConfig`.
    input_width: C, values of one input. output_width: of one embedding.
    spans: int64 grid_I3 (`contracts.Media`) -> (int64 spans_I, int64 length_I): item i gives spans_I[i] runs of
        length_I[i] embeddings. A run becomes one bidirectional span of the row, and its items attend to each other in
        the encoder, so that the same two numbers say what an item costs.
    parameters: of the encoder, without its connector. saved_bytes: (settings, inputs, bytes of an element) -> what
        autograd keeps of so many inputs in one forward. largest_item, longest_item: inputs of the largest item that is
        common (a whole image), and of the largest that there can be (a clip of as many frames as are read).
    build: the module, values not yet set; see `Built`.
    grids: (settings, count) -> about so many grids of one item, from small to large, to measure what encoding costs;
        None for items of one axis, up to `longest_item`.
    """

    name: str
    section: type[Settings]
    input_width: Callable[[Settings], int]
    output_width: Callable[[Settings], int]
    spans: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
    parameters: Callable[[Settings], int]
    saved_bytes: Callable[[Settings, int, int], float]
    largest_item: Callable[[Settings], int]
    longest_item: Callable[[Settings], int]
    build: Callable[[Settings], nn.Module]
    grids: Callable[[Settings, int], list[Grid]] | None = None


@dataclass(frozen=True, eq=False)
class Prepared:
    """An item as its encoder takes it. values_PC: float32; grid, seconds: as in `contracts.Media`, of one item."""

    values_PC: torch.Tensor
    grid: Grid
    seconds: float = 0.0


@dataclass(frozen=True)
class Picture:
    """How an item is drawn for a report.

    frames_FHW3: uint8[F, H, W, 3], an image or the frames of a clip; or spectrum_LM: float32[L, M], time by pitch.
    """

    frames_FHW3: np.ndarray | None = None
    spectrum_LM: np.ndarray | None = None


@dataclass(frozen=True)
class ItemOperation(Generic[Settings, RawItem]):
    """Something that can be done to every item of a modality in a sample, wherever it stands.

    make: (the encoder's settings, **arguments) -> what changes an item, by the random numbers of a generator alone.
        Arguments are numbers with defaults. Raises ValueError for one out of range.
    random: whether it asks the generator. What does not is the same in every epoch.
    """

    make: Callable[..., Callable[[RawItem, np.random.Generator], RawItem]]
    random: bool = False


@dataclass(frozen=True)
class CodesSpec:
    """How the model makes items of a modality: as runs of codes, from the vocabulary's range of the modality's name.

    field: name of what holds an item's codes in samples and documents. members: as `ModalitySpec.members`.
    size: settings -> codes in the range; 0 for a model that makes none. setting: the name of that setting.
    length: settings -> codes of one item.
    begin, end: control tokens around a run; a plugin leaves them open and gets free ones.
    made_by: the program that adds codes to samples, for messages.
    tokenizer: the setting of a run that names what turns codes into items; empty where the codes are what is wanted.
    """

    field: str
    members: tuple[str, ...]
    size: Callable[[RunConfig], int]
    length: Callable[[RunConfig], int]
    setting: str
    begin: str = ""
    end: str = ""
    made_by: str = ""
    tokenizer: str = ""


@dataclass(frozen=True)
class ModalitySpec(Generic[Settings, RawItem]):
    """A kind of input that samples hold.

    encoder: name of its encoder; empty for text, which needs none. control: the control token that stands in the stream
        for each of its embeddings; a plugin leaves it open and gets a free one (`control_tokens`).
    members: endings of the members of a tar, or columns of a table, that hold it, in the order of preference.
    files: the kinds of file in words, for `--help`.
    beside: fields of a record that name such items beside a conversation, one or a list. mark: what stands in its text
        where such an item belongs. parts: types of a message's parts that are such items, beside the modality's name.
    decode: a file's bytes -> the raw item; raises BadSample. prepare: -> the encoder's input. picture: of that, for
        reports.
    sizes: a file's bytes -> its sizes by name, such as "image width", for a report of shards; raises BadSample.
    preview: a file's bytes -> uint8[H, W, 3], what a contact sheet of samples shows; raises BadSample.
    operations: by the name that a source's list of operations gives them.
    codes: how the model makes such items; None if it only reads them.
    """

    name: str
    encoder: str = ""
    control: str = ""
    members: tuple[str, ...] = ()
    files: str = ""
    beside: tuple[str, ...] = ()
    mark: str = ""
    parts: tuple[str, ...] = ()
    decode: Callable[[bytes, Settings], RawItem] | None = None
    prepare: Callable[[RawItem, Settings], Prepared] | None = None
    picture: Callable[[Prepared, Settings], Picture] | None = None
    sizes: Callable[[bytes], Mapping[str, float]] | None = None
    preview: Callable[[bytes], np.ndarray] | None = None
    operations: Mapping[str, ItemOperation[Settings, RawItem]] = field(default_factory=dict)
    codes: CodesSpec | None = None
