"""Embeddings of connectors take the places of their placeholders in the stream.

Shape suffixes: T packed tokens, S tokens of a rank's stream, D model width, O embeddings, M embeddings of a memory.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from megatron_gemini.contracts import Batch, TokenLayout
from megatron_gemini.registry import MODALITIES


@dataclass(frozen=True)
class Embeddings:
    """What all connectors gave for one row, or for the tokens of it that a rank's stream holds.

    position_O: int64, where in the stream each embedding belongs. e_OD: the embeddings, in the computation's dtype.
    """

    position_O: torch.Tensor
    e_OD: torch.Tensor


@dataclass(frozen=True)
class Memory:
    """What a connector gave for one row beside the stream, for layers of the decoder that read it.

    token_M: int64, position in the row of the placeholder that each embedding belongs to, ascending. e_MD: in the
    computation's dtype.
    """

    token_M: torch.Tensor
    e_MD: torch.Tensor


def combine(batch: Batch, given: Mapping[str, torch.Tensor]) -> Embeddings | None:
    """The embeddings e_OD of each encoder for `batch`, as one; None if there are none."""
    if not given:
        return None
    positions = [batch.media[name].token_O for name in given]
    return Embeddings(torch.cat(positions), torch.cat(list(given.values())))


def place(h_SD: torch.Tensor, embeddings: Embeddings) -> torch.Tensor:
    """h_SD with the row `position_O[i]` replaced by e_OD[i]; differentiable in both."""
    # A fifth of the time of masked_scatter, forward and backward on a CPU (docs/performance.md).
    return h_SD.index_copy(0, embeddings.position_O, embeddings.e_OD.to(h_SD.dtype))


def placeholders(encoder: str) -> list[str]:
    """Control tokens that stand in the stream for what an encoder gives."""
    return [spec.control for spec in MODALITIES.entries() if spec.encoder == encoder]


def check_placeholders(
    batch: Batch, layout: TokenLayout, counts: Mapping[str, int], memories: Collection[str] = ()
) -> None:
    """Every placeholder in the row gets what is for it, at a position that the media name.

    counts: how many embeddings there are of each encoder; one that is absent gave none. memories: encoders whose
    embeddings are in no stream, so that several of them belong to one placeholder. Raises ValueError that names the
    samples concerned and both counts.
    """
    # On the host, in one copy: the row of a generation may be on a GPU, and each encoder's check would wait for that.
    token = batch.token_T.cpu().numpy()
    # Image and video share an encoder, whose media hold both in the order of the row.
    for encoder in dict.fromkeys(spec.encoder for spec in MODALITIES.entries() if spec.encoder):
        wanted = np.flatnonzero(np.isin(token, [layout.control(name) for name in placeholders(encoder)]))
        given = batch.media[encoder].token_O.cpu().numpy() if encoder in batch.media else wanted[:0]
        enough = len(given) == counts.get(encoder, 0)
        named = np.unique(given) if encoder in memories else given
        if not enough or not np.array_equal(wanted, named):
            raise ValueError(_mismatch(batch, encoder, wanted, named, counts.get(encoder, 0)))


def _mismatch(batch: Batch, encoder: str, wanted: np.ndarray, given: np.ndarray, embeddings: int) -> str:
    different = np.setxor1d(wanted, given) if not np.array_equal(wanted, given) else wanted
    # Media may name positions behind the row, and documents that have no key: the message still has to be made.
    segment = batch.segment_T.cpu().numpy()
    numbers = np.unique(segment[different[different < len(segment)]]).tolist()
    names = [batch.samples[i - 1] if 0 < i <= len(batch.samples) else f"document {i}" for i in numbers]
    return (
        f"sample {', '.join(names) or 'unknown'}: the row has {len(wanted)} placeholders for the {encoder} encoder, "
        f"its media name {len(given)} positions and the encoder gave {embeddings} embeddings; "
        "build documents and media with data.samples.document, which keeps them equal, and enable the encoder"
    )
