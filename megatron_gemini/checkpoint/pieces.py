"""A checkpoint's tensors: every rank writes the pieces it owns, any layout reads them back.

A piece is a range of one parameter's flattened tensor-parallel shard, as float32: the master weights and Adam's two
moments. Beside the safetensors file of a rank lies a JSON that says where each piece belongs in the global tensor. So
another number of ranks, or a single process, can assemble whole parameters, one at a time.
"""

from __future__ import annotations

import json
import math
import stat
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypedDict, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

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
        self._keys: dict[Path, set[str]] = {}
        for description in sorted(directory.glob("rank-*.json")):  # so that every rank's error names the same file
            try:
                pieces = [Piece.from_json(value) for value in json.loads(description.read_text())["pieces"]]
            except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
                raise ValueError(f"{description} is not a readable description of pieces: {error!r}") from error
            for piece in pieces:
                # `engine/roles.py` lets no role's name have a colon, and a parameter's has none either.
                found, _, name = piece.name.rpartition(":")
                if found == role:
                    others = self._where[name]
                    if others and others[0][1].global_shape != piece.global_shape:
                        raise ValueError(f"{description} has another shape of {name} than a rank before")
                    others.append((description.with_suffix(".safetensors"), piece))
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
        shape, key = self.shape(name), f"{kind}/{self._prefix}{name}"
        # Before any memory is taken: a description may promise more than all files hold.
        there = sum(self._count(path, key, piece.count) for path, piece in self._where[name])
        if there < math.prod(shape):
            raise ValueError(
                f"{self.directory}: {there} of {math.prod(shape)} elements of {name} are there; a file is missing"
            )
        # Zeros would pass for weights where a rank's file was not copied, so what was written is counted instead.
        whole = torch.empty(shape, dtype=torch.float32)
        shards: dict[int, list[tuple[Path, Piece]]] = defaultdict(list)
        for path, piece in self._where[name]:
            shards[piece.shard_start].append((path, piece))
        covered, end = 0, 0
        for begin, entries in sorted(shards.items()):
            piece = entries[0][1]
            # Where two overlap, the count could be right and a part of the whole be what the memory held before.
            if begin != end:
                raise ValueError(f"{self.directory}: the shards of {name} begin at {begin} and end at {end}")
            end += piece.shard_shape[piece.sharded_dim] if piece.sharded_dim is not None else 0
            covered += _place(whole, self._shard(key, name, entries), piece)
        if covered != whole.numel():
            raise ValueError(
                f"{self.directory}: {covered} of {whole.numel()} elements of {name} are there; a file is missing"
            )
        return whole

    def weight(self, name: str) -> torch.Tensor:
        """float32[global shape], the weights alone."""
        return self.read(WEIGHT, name)

    def _shard(self, key: str, name: str, entries: list[tuple[Path, Piece]]) -> torch.Tensor:
        shape, filled = entries[0][1].shard_shape, 0
        for _, piece in sorted(entries, key=lambda entry: (entry[1].start, entry[1].count)):
            if piece.start != filled or piece.shard_shape != shape:
                raise ValueError(f"{self.directory}: the pieces of {name} do not fit each other; a file is missing")
            filled += piece.count
        if filled != math.prod(shape):
            raise ValueError(
                f"{self.directory}: {filled} of {math.prod(shape)} elements of a shard of {name} are there; "
                "a file is missing"
            )
        flat = torch.empty(filled, dtype=torch.float32)
        for path, piece in entries:
            tensor = self._file(path, key).get_tensor(key).float()
            flat[piece.start : piece.start + piece.count] = tensor.reshape(-1)
        return flat.view(shape)

    def _count(self, path: Path, key: str, expected: int) -> int:
        """Elements of a tensor, which is not read. Raises ValueError if the file has not as many as expected."""
        found = math.prod(self._file(path, key).get_slice(key).get_shape())
        if found != expected:
            raise ValueError(f"{path} holds {found} elements of {key}, its description says {expected}")
        return found

    def _file(self, path: Path, key: str) -> safe_open:
        """Raises ValueError if the file cannot be read, or lacks the tensor."""
        try:
            if path not in self._files:
                self._files[path] = safe_open(path, framework="pt")
                self._keys[path] = set(self._files[path].keys())
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path} is missing or damaged ({key}: {error})") from error
        if key not in self._keys[path]:
            raise ValueError(f"{path} is missing or damaged ({key} is not in it)")
        return self._files[path]

    def has(self, kind: str, name: str) -> bool:
        """Whether any rank has written this of a parameter: there are no moments of one that was frozen."""
        key, found = f"{kind}/{self._prefix}{name}", False
        for path, piece in self._where[name]:
            self._file(path, f"{WEIGHT}/{self._prefix}{name}")
            found = found or (piece.count > 0 and key in self._keys[path])
        return found


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


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write a safetensors file that others may read if the umask lets them: the library's are the owner's alone."""
    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)
    save_file(dict(tensors), path)
    path.chmod(mode)
