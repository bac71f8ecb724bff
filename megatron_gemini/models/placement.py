"""Encoder embeddings take the places of their placeholders in the stream.

Shape suffixes: T packed tokens, S tokens of a rank's stream, D model width, O encoder output embeddings.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch

from megatron_gemini.contracts import AUDIO, VISION, Batch, TokenLayout

PLACEHOLDERS = {VISION: ("image", "video"), AUDIO: ("audio",)}


@dataclass(frozen=True)
class Embeddings:
    """What all encoders gave for one row, or for the tokens of it that a rank's stream holds.

    position_O: int64, where in the stream each embedding belongs. e_OD: the embeddings, in the computation's dtype.
    """

    position_O: torch.Tensor
    e_OD: torch.Tensor


def combine(batch: Batch, given: dict[str, torch.Tensor]) -> Embeddings | None:
    """The embeddings e_OD of each encoder for `batch`, as one; None if there are none."""
    if not given:
        return None
    positions = [batch.media[name].token_O for name in given]
    return Embeddings(torch.cat(positions), torch.cat(list(given.values())))


def place(h_SD: torch.Tensor, embeddings: Embeddings) -> torch.Tensor:
    """h_SD with the row `position_O[i]` replaced by e_OD[i]; differentiable in both."""
    return h_SD.index_copy(0, embeddings.position_O, embeddings.e_OD.to(h_SD.dtype))


def check_placeholders(batch: Batch, layout: TokenLayout, embeddings: dict[str, int]) -> None:
    """Every placeholder in the row gets exactly one embedding of its encoder, at a position that the media name.

    embeddings: how many each encoder gave; one that is absent gave none. Raises ValueError that names the samples
    concerned and both counts.
    """
    token = batch.token_T.cpu().numpy()
    for encoder, names in PLACEHOLDERS.items():
        is_placeholder = functools.reduce(np.logical_or, (token == layout.control(name) for name in names))
        wanted = np.flatnonzero(is_placeholder)
        given = batch.media[encoder].token_O.cpu().numpy() if encoder in batch.media else wanted[:0]
        if not len(wanted) == len(given) == embeddings.get(encoder, 0) or (wanted != given).any():
            raise ValueError(_mismatch(batch, encoder, wanted, given, embeddings.get(encoder, 0)))


def _mismatch(batch: Batch, encoder: str, wanted: np.ndarray, given: np.ndarray, embeddings: int) -> str:
    different = np.setxor1d(wanted, given) if len(wanted) != len(given) or (wanted != given).any() else wanted
    segment = batch.segment_T.cpu().numpy()
    numbers = np.unique(segment[different[different < len(segment)]]).tolist()
    names = [batch.samples[i - 1] if 0 < i <= len(batch.samples) else f"document {i}" for i in numbers]
    return (
        f"sample {', '.join(names) or 'unknown'}: the row has {len(wanted)} placeholders for the {encoder} encoder, "
        f"its media name {len(given)} positions and the encoder gave {embeddings} embeddings; "
        "build documents and media with data.document, which keeps them equal, and enable the encoder"
    )
