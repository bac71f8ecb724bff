"""One document: prompt and answer items become tokens, spans, loss marks and encoder inputs.

Shape suffixes: L tokens of the document, P encoder input rows, C values an input row, H/W pixels, F frames.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypedDict

import numpy as np

from megatron_gemini.config.encoders import EncoderConfig
from megatron_gemini.contracts import TEXT, TokenLayout
from megatron_gemini.data.samples.items import Codes, ColumnValue, EncoderInput, Example, Item, Text, Turn
from megatron_gemini.data.samples.prepare import prepare
from megatron_gemini.modalities.bad_sample import BadSample
from megatron_gemini.registry import MODALITIES


class Encodes(Protocol):
    """What is needed of a text tokenizer."""

    def encode(self, text: str) -> list[int]: ...


@dataclass(frozen=True)
class Size:
    """What a document takes of a row: tokens, and inputs of each encoder."""

    tokens: int
    inputs: Mapping[str, int] = field(default_factory=dict)

    def __sub__(self, taken: Size) -> Size:
        """What is left; an encoder that is not named here has no limit."""
        left = {name: count - taken.inputs.get(name, 0) for name, count in self.inputs.items()}
        return Size(self.tokens - taken.tokens, left)

    def first_exceeded(self, size: Size) -> str | None:
        """The first encoder of which `size` has more inputs than there is room for."""
        return next((name for name, room in self.inputs.items() if size.inputs.get(name, 0) > room), None)


@dataclass(eq=False)
class Document:
    """One document, not yet placed in a row.

    token_L: int64. loss_L: bool, whether the token is a target that counts. modality_L: int8, of the token itself.
    span_L: int32, 0 or the document's own span number from 1.
    media: encoder inputs in the order of their placeholders; media_begin: where each one's placeholders begin.
    columns: what its task says of it beside its tokens, by name; `packing.columns` puts it into rows.
    """

    key: str
    layout: TokenLayout
    token_L: np.ndarray
    loss_L: np.ndarray
    modality_L: np.ndarray
    span_L: np.ndarray
    media: list[EncoderInput] = field(default_factory=list)
    media_begin: list[int] = field(default_factory=list)
    columns: Mapping[str, ColumnValue] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.token_L)

    @property
    def size(self) -> Size:
        inputs: Counter[str] = Counter()
        for item in self.media:
            inputs[item.encoder] += len(item.values_PC)
        return Size(len(self), inputs)


def build_example(
    example: Example,
    *,
    layout: TokenLayout,
    text_tokenizer: Encodes,
    encoders: Mapping[str, EncoderConfig],
    key: str,
) -> Document:
    """The example as a document of a source: a conversation if it has turns, otherwise its two sides. Where there is
    no answer, there is loss on the whole of it. Raises as `build_document` does.
    """
    given = _Given(layout=layout, text_tokenizer=text_tokenizer, encoders=encoders, key=key)
    if example.turns:
        document = build_conversation(example.turns, **given)
    else:
        document = build_document(example.prompt, example.answer, loss_on_prompt=example.answer is None, **given)
    document.columns = example.columns
    return document


class _Given(TypedDict):
    """What every document is built with."""

    layout: TokenLayout
    text_tokenizer: Encodes
    encoders: Mapping[str, EncoderConfig]
    key: str


def build_document(
    prompt: Sequence[Item],
    answer: Sequence[Item] | None,
    *,
    layout: TokenLayout,
    text_tokenizer: Encodes,
    encoders: Mapping[str, EncoderConfig],
    key: str,
    loss_on_prompt: bool = False,
) -> Document:
    """Lay the items out as one document.

    With an answer: `bos user <prompt> model <answer> eos`, loss on the answer and eos. An empty answer leaves the
    document open after `model`, ready to be continued. Without one (`answer=None`): `bos <prompt> eos`, and
    `loss_on_prompt` puts loss on its text and codes. Placeholders of inputs never carry loss.

    Raises BadSample: bad_codes for a code out of range, <modality>_disabled for an input whose encoder is off.
    """
    writer = _Writer(layout, text_tokenizer)
    writer.control("bos", loss=False)
    if answer is not None:
        writer.control("user", loss=False)
    for item in prompt:
        writer.item(prepare(item, encoders), loss=loss_on_prompt, key=key)
    if answer is not None:
        writer.control("model", loss=False)
        for item in answer:
            writer.item(prepare(item, encoders), loss=True, key=key)
    if answer is None or answer:  # an open document goes on where the model begins to answer
        writer.control("eos", loss=answer is not None or loss_on_prompt)
    return writer.document(key)


def build_conversation(
    turns: Sequence[Turn],
    *,
    layout: TokenLayout,
    text_tokenizer: Encodes,
    encoders: Mapping[str, EncoderConfig],
    key: str,
) -> Document:
    """Lay the turns out as one document: `bos user <items> model <items> eos user <items> model <items> eos`.

    Loss is on the model's turns and the eos that ends each of them. With one question and one answer the document is
    that of `build_document`. Raises as `build_document` does.
    """
    writer = _Writer(layout, text_tokenizer)
    writer.control("bos", loss=False)
    for turn in turns:
        writer.control("model" if turn.answer else "user", loss=False)
        for item in turn.items:
            writer.item(prepare(item, encoders), loss=turn.answer, key=key)
        # The model learns where its turn ends. The user's has no end of its own: `model` says that it is over.
        if turn.answer:
            writer.control("eos", loss=True)
    return writer.document(key)


class _Writer:
    """Appends items to the growing columns of a document."""

    def __init__(self, layout: TokenLayout, text_tokenizer: Encodes) -> None:
        self.layout, self.text_tokenizer = layout, text_tokenizer
        # Lists, which grow run by run, and arrays once at the end: an array would be copied with every item.
        self.tokens: list[int] = []
        self.losses: list[bool] = []
        self.modalities: list[int] = []
        self.spans: list[int] = []
        self.last_span = 0
        self.media: list[EncoderInput] = []
        self.media_begin: list[int] = []

    def run(self, tokens: Sequence[int], loss: bool, target: str = TEXT, span: int = 0) -> None:
        self.tokens += tokens
        self.losses += [loss] * len(tokens)
        self.modalities += [self.layout.targets.index(target)] * len(tokens)
        self.spans += [span] * len(tokens)

    def control(self, name: str, loss: bool) -> None:
        self.run([self.layout.control(name)], loss)

    def item(self, item: Text | Codes | EncoderInput, loss: bool, key: str) -> None:
        if isinstance(item, Text):
            self.run(self.text_tokenizer.encode(item.text), loss)
        elif isinstance(item, Codes):
            self.codes(item, loss, key)
        else:
            self.input(item)

    def codes(self, item: Codes, loss: bool, key: str) -> None:
        marks, codes = MODALITIES.get(item.target).codes, self.layout.code_range(item.target)
        assert marks is not None, f"no {item.target} can be made"
        outside = [code for code in item.codes if not 0 <= code < len(codes)]
        if outside or not item.codes:
            what = f"{item.target} code {outside[0]}" if outside else f"no {item.target} codes"
            raise BadSample("bad_codes", f"{key}: {what}; the codebook has 0..{len(codes) - 1}")
        self.control(marks.begin, loss)
        self.run([codes[code] for code in item.codes], loss, item.target)
        self.control(marks.end, loss)

    def input(self, item: EncoderInput) -> None:
        self.media.append(item)
        self.media_begin.append(len(self.tokens))
        placeholder = self.layout.control(item.placeholder)
        if item.memory:  # its embeddings are in no stream; from this placeholder on they may be read
            self.run([placeholder], loss=False)
        # Without loss wherever they stand: what placeholders stand for is given, and no token says it.
        for length in item.spans:
            self.last_span += 1
            self.run([placeholder] * length, loss=False, span=self.last_span)

    def document(self, key: str) -> Document:
        return Document(
            key=key,
            layout=self.layout,
            token_L=np.array(self.tokens, np.int64),
            loss_L=np.array(self.losses, np.bool_),
            modality_L=np.array(self.modalities, np.int8),
            span_L=np.array(self.spans, np.int32),
            media=self.media,
            media_begin=self.media_begin,
        )
