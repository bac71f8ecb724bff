"""A checkpoint's tensors: every rank writes the pieces it owns, any layout reads them back.

A piece is a range of one parameter's flattened tensor-parallel shard, as float32: the master weights and Adam's two
moments. Beside the safetensors file of a rank lies a JSON that says where each piece belongs in the global tensor. So
another number of ranks, or a single process, can assemble whole parameters, one at a time.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypedDict, cast

import torch
from safetensors import SafetensorError, safe_open

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
        return Piece(
            value["name"],
            value["start"],
            value["count"],
            tuple(map(int, value["shard_shape"])),
            value["sharded_dim"],
            value["shard_start"],
            tuple(map(int, value["global_shape"])),
        )

    def to_json(self) -> PieceJson:
        return cast(PieceJson, asdict(self))


class PieceReader:
    """Whole parameters out of the pieces of a checkpoint directory.

    role: of the model beside the policy that is read (`engine/roles.py`); "" reads the policy, and nothing of the
        others. Names are those of the model itself.
    """

    def __init__(self, directory: Path, role: str = "") -> None:
        """Raises `ValueError` that names the file when a description is missing or unreadable."""
        self.directory, self._prefix = directory, f"{role}:" if role else ""
        self._where: dict[str, list[tuple[Path, Piece]]] = defaultdict(list)
        # Kept open: each is a memory map, of which reading a piece touches the piece's own pages only.
        self._files: dict[Path, safe_open] = {}
        for description in sorted(directory.glob("rank-*.json")):  # so that every rank's error names the same file
            try:
                pieces = [Piece.from_json(value) for value in json.loads(description.read_text())["pieces"]]
            except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
                raise ValueError(f"{description} is not a readable description of pieces: {error}") from error
            for piece in pieces:
                # `engine/roles.py` lets no role's name have a colon, and a parameter's has none either.
                found, _, name = piece.name.rpartition(":")
                if found == role:
                    self._where[name].append((description.with_suffix(".safetensors"), piece))
        if not self._where:
            what = f"nothing of the role {role}" if role else "no rank-*.json; it is not a checkpoint of this trainer"
            raise ValueError(f"{directory} holds {what}")

    def names(self) -> list[str]:
        return sorted(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        """Global shape of a parameter; `ValueError` for a name that is not there."""
        if name not in self._where:
            raise ValueError(f"{self.directory} has no parameter {name}")
        return self._where[name][0][1].global_shape

    def read(self, kind: str, name: str) -> torch.Tensor:
        """float32[global shape] of `weight`, `exp_avg` or `exp_avg_sq`."""
        # Zeros would pass for weights where a rank's file was not copied, so what was written is counted instead.
        whole = torch.empty(self.shape(name), dtype=torch.float32)
        shards: dict[int, list[tuple[Path, Piece]]] = defaultdict(list)
        for path, piece in self._where[name]:
            shards[piece.shard_start].append((path, piece))
        covered = 0
        for entries in shards.values():
            shard = self._shard(kind, name, entries)
            covered += _place(whole, shard, entries[0][1])
        if covered != whole.numel():
            raise ValueError(
                f"{self.directory}: {covered} of {whole.numel()} elements of {name} are there; a file is missing"
            )
        return whole

    def weight(self, name: str) -> torch.Tensor:
        """float32[global shape], the weights alone."""
        return self.read(WEIGHT, name)

    def _shard(self, kind: str, name: str, entries: list[tuple[Path, Piece]]) -> torch.Tensor:
        shape = entries[0][1].shard_shape
        flat = torch.empty(math.prod(shape), dtype=torch.float32)
        filled = 0
        for path, piece in entries:
            flat[piece.start : piece.start + piece.count] = self._tensor(
                path, f"{kind}/{self._prefix}{name}", piece.count
            )
            filled += piece.count
        if filled != flat.numel():
            raise ValueError(
                f"{self.directory}: {filled} of {flat.numel()} elements of a shard of {name} are there; "
                "a file is missing"
            )
        return flat.view(shape)

    def _tensor(self, path: Path, key: str, count: int) -> torch.Tensor:
        try:
            if path not in self._files:
                self._files[path] = safe_open(path, framework="pt")
            tensor = self._files[path].get_tensor(key)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path} is missing or damaged ({key}: {error})") from error
        if tensor.numel() != count:
            raise ValueError(f"{path} holds {tensor.numel()} elements of {key}, its description says {count}")
        return tensor


def _place(whole: torch.Tensor, shard: torch.Tensor, piece: Piece) -> int:
    """Copy a shard to its place; rows that pad the vocabulary fall away. Returns the elements copied."""
    if piece.sharded_dim is None:
        whole.copy_(shard)
        return whole.numel()
    # How many rows pad the vocabulary depends on the number of tensor-parallel ranks: they belong to no global tensor.
    dim = piece.sharded_dim
    kept = max(0, min(shard.shape[dim], whole.shape[dim] - piece.shard_start))
    target = whole.narrow(dim, min(piece.shard_start, whole.shape[dim]), kept)
    target.copy_(shard.narrow(dim, 0, kept))
    return target.numel()


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
