"""Packing: which documents share a row, and the row they make.

Shape suffixes: T tokens of the row, L tokens of one document, P encoder input rows, C values an input row,
I items, O encoder output embeddings.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import numpy as np
import torch

from megatron_gemini.config.data import DataConfig
from megatron_gemini.contracts import Batch, Media, RowFormat
from megatron_gemini.data.packing.columns import lay_out, of_targets, pack_columns
from megatron_gemini.data.samples.document import Document, Size
from megatron_gemini.modalities.bad_sample import BadSample
from megatron_gemini.registry import ENCODERS


def row_limits(data: DataConfig) -> Size:
    """What one row may hold."""
    return Size(data.row_tokens, {name: limit for name, limit in data.row_inputs.items() if limit})


def choose(waiting: Sequence[Size], room: Size) -> list[int]:
    """Places of the waiting documents that together fill what is left of a row best, in increasing order.

    waiting: the oldest first. All of them if they fit. Otherwise those that fill the most tokens, and of equals those
    with the older documents. Where all of them would need more inputs of an encoder than there is room for, it is
    chosen among as many as keep the limits together, the oldest first. Then any choice of them does.
    """
    # Several budgets at once would be a knapsack of as many dimensions. Tokens are what a row is filled by; the
    # encoders' budgets only bound their memory, so that the documents which keep them are taken first.
    places, left = [], room
    for place, size in enumerate(waiting):
        if size.tokens <= room.tokens and left.first_exceeded(size) is None:
            places.append(place)
            left = left - Size(0, size.inputs)
    return [places[i] for i in fullest([waiting[place].tokens for place in places], room.tokens)]


def fullest(lengths: Sequence[int], room: int) -> list[int]:
    """Indices of the numbers whose sum is the largest that is at most `room`; of equal choices, that of low indices.

    Exact: bit s of `sums[k]` says whether some of the last k numbers have the sum s, so a number costs one shift.
    """
    if sum(lengths) <= room:
        return list(range(len(lengths)))
    # A Python integer is the table of the subset sum: 16 documents in a row of 2,048 tokens cost 20 microseconds.
    mask = (1 << room + 1) - 1
    sums = [1]
    for length in reversed(lengths):
        sums.append((sums[-1] | sums[-1] << length) & mask)
    left, chosen = sums.pop().bit_length() - 1, []
    for index, length in enumerate(lengths):
        rest = sums.pop()
        if length <= left and rest >> (left - length) & 1:
            chosen.append(index)
            left -= length
    return chosen


def check_fits(document: Document, limits: Size) -> None:
    """Raise BadSample for a document that no row can hold: too_long, too_many_ENCODER_inputs."""
    size = document.size
    if size.tokens > limits.tokens:
        raise BadSample(
            "too_long",
            f"{document.key}: {size.tokens} tokens do not fit into a row of {limits.tokens}; raise data.row_tokens",
        )
    encoder = limits.first_exceeded(size)
    if encoder is not None:
        raise BadSample(
            f"too_many_{encoder}_inputs",
            f"{document.key}: {size.inputs[encoder]} inputs of the {encoder} encoder do not fit into a row of "
            f"{limits.inputs[encoder]}; raise data.row_inputs.{encoder}",
        )


def pack(documents: Sequence[Document], row_tokens: int, form: RowFormat) -> Batch:
    """One row of `row_tokens` tokens that holds the documents (at least one) in this order, padded at its end.

    The weight of a target is that of its kind, 0 where its document puts no loss.
    Raises BadSample("too_long") for a document longer than a row, BadSample("bad_column") for one whose columns are not
    as `form` declares them, ValueError when they do not fit together.
    """
    for document in documents:  # told apart from documents that only do not fit together, which is a caller's mistake
        check_fits(document, Size(row_tokens))
    total = sum(map(len, documents))
    if total > row_tokens:
        raise ValueError(f"{len(documents)} documents have {total} tokens; the row holds {row_tokens}")

    layout = documents[0].layout
    pad, weight_of = layout.control("pad"), np.array([form.weight(target) for target in layout.targets])
    begins = [0, *itertools.accumulate(map(len, documents))][:-1]
    # A document numbers its own spans from 1; in the row every one needs a number of its own.
    last_spans = [int(document.span_L.max(initial=0)) for document in documents]
    spans_before = [0, *itertools.accumulate(last_spans)][:-1]
    spans = [
        np.where(document.span_L > 0, document.span_L + before, 0)
        for document, before in zip(documents, spans_before, strict=True)
    ]

    def row(values: Iterable[np.ndarray], dtype: str, fill: int = 0) -> torch.Tensor:
        return lay_out(values, dtype, fill, row_tokens)

    return Batch(
        token_T=row((document.token_L for document in documents), "int64", pad),
        target_T=row((of_targets(document.token_L, pad) for document in documents), "int64", pad),
        weight_T=row((of_targets(weight_of[d.modality_L] * d.loss_L, 0) for d in documents), "float32"),
        position_T=row((np.arange(len(document)) for document in documents), "int64"),
        segment_T=row((np.full(len(d), number) for number, d in enumerate(documents, start=1)), "int32"),
        span_T=row(spans, "int32"),
        modality_T=row((of_targets(document.modality_L, 0) for document in documents), "int8"),
        columns=pack_columns(documents, form.columns, row_tokens),
        media=_media(documents, begins),
        samples=[document.key for document in documents],
    )


def _media(documents: Sequence[Document], begins: Sequence[int]) -> dict[str, Media]:
    """Inputs by encoder, in the order of their placeholders; token_O counts from the row's beginning."""
    placed = [
        (item, begin + offset)
        for document, begin in zip(documents, begins, strict=True)
        for item, offset in zip(document.media, document.media_begin, strict=True)
    ]
    media = {}
    # In the order of the registry: every rank and every row has its encoders in the same one.
    for encoder in ENCODERS:
        mine = [(item, start) for item, start in placed if item.encoder == encoder]
        if mine:
            media[encoder] = Media(
                values_PC=torch.cat([item.values_PC for item, _ in mine]),
                grid_I3=torch.tensor([item.grid for item, _ in mine], dtype=torch.int64),
                time_I=torch.tensor([item.seconds for item, _ in mine], dtype=torch.float32),
                # All embeddings of a memory belong to its one placeholder.
                token_O=torch.cat(
                    [
                        torch.full((item.memory,), start) if item.memory else start + torch.arange(sum(item.spans))
                        for item, start in mine
                    ]
                ),
            )
    return media
