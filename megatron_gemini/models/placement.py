"""Encoder embeddings take the places of their placeholders in the stream.

Shape suffixes: T packed tokens, D model width, O encoder output embeddings.
"""

from __future__ import annotations

import torch

from megatron_gemini.contracts import AUDIO, VISION, Batch, Media, TokenLayout

PLACEHOLDERS = {VISION: ("image", "video"), AUDIO: ("audio",)}


def place(h_TD: torch.Tensor, e_OD: torch.Tensor, media: Media) -> torch.Tensor:
    """h_TD with the row `token_O[i]` replaced by e_OD[i]; differentiable in both."""
    return h_TD.index_copy(0, media.token_O, e_OD.to(h_TD.dtype))


def check_placeholders(batch: Batch, encoder: str, layout: TokenLayout, embeddings: int) -> None:
    """Every placeholder of `encoder` gets exactly one of its `embeddings`, each at a position the media name.

    Raises ValueError that names the samples concerned and both counts.
    """
    token_T = batch.token_T
    wanted_T = torch.zeros_like(token_T, dtype=torch.bool)
    for name in PLACEHOLDERS[encoder]:
        wanted_T |= token_T == layout.control(name)
    position_O = wanted_T.nonzero().squeeze(1)
    media = batch.media.get(encoder)
    given_O = media.token_O if media is not None else position_O[:0]
    if len(given_O) == embeddings and torch.equal(position_O, given_O):
        return
    given_T = torch.zeros_like(wanted_T)
    given_T[given_O] = True
    different = batch.segment_T[wanted_T != given_T].unique().tolist()
    names = [batch.samples[i - 1] if 0 < i <= len(batch.samples) else f"document {i}" for i in different]
    raise ValueError(
        f"sample {', '.join(names) or 'unknown'}: the row has {len(position_O)} placeholders for the {encoder} encoder, "
        f"its media name {len(given_O)} positions and the encoder gave {embeddings} embeddings; "
        "build documents and media with data.document, which keeps them equal"
    )
