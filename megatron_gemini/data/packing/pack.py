"""Packing: which documents share a row, and the row they make.

Shape suffixes: T tokens of the row, L tokens of one document, P encoder input rows, C values an input row,
I items, O encoder output embeddings.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np
import torch

from megatron_gemini.config.data import DataConfig
from megatron_gemini.config.training import LossConfig
from megatron_gemini.contracts import ENCODERS, IMAGE, Batch, Media
from megatron_gemini.data.samples.document import Document, Size
from megatron_gemini.modalities.bad_sample import BadSample

NO_LIMIT = sys.maxsize


def row_limits(data: DataConfig) -> Size:
    """What one row may hold."""
    return Size(data.row_tokens, data.row_patches or NO_LIMIT, data.row_audio_frames or NO_LIMIT)


def choose(waiting: Sequence[Size], room: Size) -> list[int]:
    """Places of the waiting documents that together fill what is left of a row best, in increasing order.

    waiting: the oldest first. All of them if they fit. Otherwise those that fill the most tokens, and of equals those
    with the older documents. Where all of them would need more patches or audio frames than there is room for, the
    documents are chosen from as many as keep the limits together, the oldest first: then any choice of them does.
    """
    places, left = [], room
    for place, size in enumerate(waiting):
        if size.tokens <= room.tokens and size.patches <= left.patches and size.audio_frames <= left.audio_frames:
            places.append(place)
            left = left._replace(
                patches=left.patches - size.patches, audio_frames=left.audio_frames - size.audio_frames
            )
    return [places[i] for i in fullest([waiting[place].tokens for place in places], room.tokens)]


def fullest(lengths: Sequence[int], room: int) -> list[int]:
    """Indices of the numbers whose sum is the largest that is at most `room`; of equal choices, that of low indices.

    Exact: bit s of `sums[k]` says whether some of the last k numbers have the sum s, so a number costs one shift.
    """
    if sum(lengths) <= room:
        return list(range(len(lengths)))
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
    """Raise BadSample for a document that no row can hold: too_long, too_many_patches, too_much_audio."""
    size = document.size
    for reason, count, limit, what, option in (
        ("too_long", size.tokens, limits.tokens, "tokens", "row_tokens"),
        ("too_many_patches", size.patches, limits.patches, "patches", "row_patches"),
        ("too_much_audio", size.audio_frames, limits.audio_frames, "log-mel frames", "row_audio_frames"),
    ):
        if count > limit:
            raise BadSample(
                reason, f"{document.key}: {count} {what} do not fit into a row of {limit}; raise data.{option}"
            )


def pack(documents: Sequence[Document], row_tokens: int, loss_weights: LossConfig) -> Batch:
    """One row of `row_tokens` tokens that holds the documents (at least one) in this order, padded at its end.

    The weight of a target is loss_weights.text or .image by its modality, 0 where its document puts no loss.
    Raises BadSample("too_long") for a document longer than a row, ValueError when they do not fit together.
    """
    for document in documents:
        check_fits(document, Size(row_tokens, NO_LIMIT, NO_LIMIT))
    total = sum(map(len, documents))
    if total > row_tokens:
        raise ValueError(f"{len(documents)} documents have {total} tokens; the row holds {row_tokens}")

    pad = documents[0].layout.control("pad")
    token_T = np.full(row_tokens, pad, np.int64)
    target_T = np.full(row_tokens, pad, np.int64)
    weight_T = np.zeros(row_tokens, np.float32)
    position_T = np.zeros(row_tokens, np.int64)
    segment_T = np.zeros(row_tokens, np.int32)
    span_T = np.zeros(row_tokens, np.int32)
    modality_T = np.zeros(row_tokens, np.int8)
    begins, begin, spans = [], 0, 0
    for number, document in enumerate(documents, start=1):
        end = begin + len(document)
        token_T[begin:end] = document.token_L
        position_T[begin:end] = np.arange(len(document))
        segment_T[begin:end] = number
        span_T[begin:end] = np.where(document.span_L > 0, document.span_L + spans, 0)
        predicting = slice(begin, end - 1)
        target_T[predicting] = document.token_L[1:]
        modality_T[predicting] = document.modality_L[1:]
        weights_L = np.where(document.modality_L == IMAGE, loss_weights.image, loss_weights.text)
        weight_T[predicting] = (weights_L * document.loss_L)[1:]
        spans += int(document.span_L.max(initial=0))
        begins.append(begin)
        begin = end
    return Batch(
        token_T=torch.from_numpy(token_T),
        target_T=torch.from_numpy(target_T),
        weight_T=torch.from_numpy(weight_T),
        position_T=torch.from_numpy(position_T),
        segment_T=torch.from_numpy(segment_T),
        span_T=torch.from_numpy(span_T),
        modality_T=torch.from_numpy(modality_T),
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
    for encoder in ENCODERS:
        mine = [(item, start) for item, start in placed if item.encoder == encoder]
        if mine:
            media[encoder] = Media(
                values_PC=torch.cat([item.values_PC for item, _ in mine]),
                grid_I3=torch.tensor([item.grid for item, _ in mine], dtype=torch.int64),
                time_I=torch.tensor([item.seconds for item, _ in mine], dtype=torch.float32),
                token_O=torch.cat([torch.arange(start, start + sum(item.spans)) for item, start in mine]),
            )
    return media
