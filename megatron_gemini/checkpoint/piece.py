"""Where a stored range belongs: every rank of a checkpoint writes the pieces it owns.

A piece is a range of one parameter's flattened tensor-parallel shard: the master weights and Adam's two moments as
float32, frozen weights in their own precision. Beside the safetensors file of a rank lies a JSON that says where each
piece belongs in the global tensor. So another number of ranks, or a single process, can find what it needs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TypedDict, cast

import torch

WEIGHT = "weight"
MOMENTS = ("exp_avg", "exp_avg_sq")


class PieceJson(TypedDict):
    """A `Piece` in a JSON file."""

    name: str
    start: int
    count: int
    shard_shape: Sequence[int]
    sharded_dim: int | None
    shard_start: int
    global_shape: Sequence[int]


@dataclass(frozen=True)
class Piece:
    """Where a stored range belongs.

    Elements [start, start + count) of a flattened shard of shape `shard_shape`, which begins at `shard_start` along
    `sharded_dim` of the global tensor (None: the shard is the whole tensor).
    """

    name: str
    start: int
    count: int
    shard_shape: tuple[int, ...]
    sharded_dim: int | None
    shard_start: int
    global_shape: tuple[int, ...]

    @staticmethod
    def from_json(value: PieceJson) -> Piece:
        """Raises ValueError, KeyError or TypeError for what `to_json` never writes: it may be a stranger's."""
        shapes = [tuple(value[key]) for key in ("shard_shape", "global_shape")]
        piece = Piece(
            value["name"],
            value["start"],
            value["count"],
            shapes[0],
            value["sharded_dim"],
            value["shard_start"],
            shapes[1],
        )
        numbers = (piece.start, piece.count, piece.shard_start, *piece.shard_shape, *piece.global_shape)
        if not isinstance(piece.name, str) or not all(type(each) is int and 0 <= each < 1 << 62 for each in numbers):
            raise ValueError(f"a piece of {piece.name!r} has something else in the place of a number")
        dims = [dim for dim, sizes in enumerate(zip(*shapes, strict=True)) if sizes[0] != sizes[1]]
        dim = piece.sharded_dim
        if dim is not None and not (type(dim) is int and 0 <= dim < len(shapes[0])):
            raise ValueError(f"{piece.name} is divided along {dim!r}, which is no dimension of {shapes[1]}")
        # Copied as it is, a smaller shard would be repeated over the whole.
        if any(each != dim for each in dims) or piece.start + piece.count > math.prod(piece.shard_shape):
            raise ValueError(f"a piece of {piece.name} does not lie in the shape {shapes[0]} or {shapes[1]}")
        return piece

    def to_json(self) -> PieceJson:
        return cast(PieceJson, asdict(self))


def cut(whole: torch.Tensor, piece: Piece) -> torch.Tensor:
    """The float32[count] that `piece` stands for, cut out of the whole parameter (padding rows are zero)."""
    if piece.sharded_dim is not None:
        dim, size = piece.sharded_dim, piece.shard_shape[piece.sharded_dim]
        begin = min(piece.shard_start, whole.shape[dim])
        kept = max(0, min(size, whole.shape[dim] - begin))
        shard = whole.new_zeros(piece.shard_shape)
        shard.narrow(dim, 0, kept).copy_(whole.narrow(dim, begin, kept))
        whole = shard
    return whole.reshape(-1)[piece.start : piece.start + piece.count]
