"""Between an engine's fragments and a checkpoint's pieces."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_gemini.checkpoint.piece import WEIGHT, Piece
from megatron_gemini.checkpoint.pieces import PieceReader
from megatron_gemini.engine.internals.fragments import Fragment
from megatron_gemini.parallel.parameters import placement_of


def describe(fragment: Fragment, role: str = "") -> Piece:
    """The piece that a rank's fragment is in a checkpoint. role: "" for the policy's."""
    placement = placement_of(fragment.parameter)
    return Piece(
        f"{role}:{fragment.name}" if role else fragment.name,
        fragment.start,
        fragment.count,
        fragment.shard_shape,
        placement.sharded_dim,
        placement.start if placement.sharded_dim is not None else 0,
        tuple(placement.global_shape),
    )


def check_shapes(fragments: Sequence[Fragment], reader: PieceReader) -> None:
    """Raise `ValueError` at the first parameter that the checkpoint lacks or holds in another shape, with both."""
    stored = set(reader.names())
    for fragment in fragments:
        name, shape = fragment.name, describe(fragment).global_shape
        if name not in stored:
            raise ValueError(f"{reader.directory} has no parameter {name} {shape}; it is of another model")
        if reader.shape(name) != shape:
            raise ValueError(
                f"{reader.directory} holds {name} with shape {reader.shape(name)}, the model has {shape}; "
                "use the configuration that it was trained with"
            )


def fill(fragments: Sequence[Fragment], reader: PieceReader, kinds: Sequence[str] = (WEIGHT,)) -> None:
    """Read what this rank holds of every parameter. kinds: of `pieces`; moments must exist.

    The shapes must have been checked.
    """
    for fragment in fragments:
        if not fragment.count:  # ZeRO-3 cuts into equal pieces, of which a small parameter fills the first only
            continue
        piece = describe(fragment)
        for kind in kinds:
            target = fragment.master() if kind == WEIGHT else fragment.moment(kind)
            if target.dtype == torch.float32 and target.device.type == "cpu" and target.is_contiguous():
                reader.read_into(kind, piece, target.detach())
            else:
                target.copy_(reader.read_piece(kind, piece))
