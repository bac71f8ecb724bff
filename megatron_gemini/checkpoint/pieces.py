"""What any layout reads back of a checkpoint's pieces: whole parameters, or the ranges that a rank holds of them."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from megatron_gemini.checkpoint.blocks import BlockCache
from megatron_gemini.checkpoint.index import INDEX, Index, read_index
from megatron_gemini.checkpoint.piece import WEIGHT, Piece
from megatron_gemini.checkpoint.ranges import GLOBAL, LENGTH, LOCAL, overlaps, segments
from megatron_gemini.checkpoint.tensor_file import TensorFile

_AT_ONCE = 1 << 24
"""Elements that are read at once, beside those that are kept."""


class PieceReader:
    """Parameters out of the pieces of a checkpoint directory, by ranges: of another layout's files it reads what it
    needs.

    What is read is compared with the index, block by block, where the directory has one.
    role: of the model beside the policy that is read (`engine/roles.py`); "" reads the policy, and nothing of the
        others. Names are those of the model itself.
    """

    def __init__(self, directory: Path, role: str = "") -> None:
        """Raises `ValueError` that names the file when a description is missing or unreadable."""
        self.directory, self._prefix = directory, f"{role}:" if role else ""
        self._index: Index | None = read_index(directory) if (directory / INDEX).is_file() else None
        self._where: dict[str, list[tuple[Path, Piece]]] = defaultdict(list)
        self._files: dict[Path, TensorFile] = {}
        self._cache = BlockCache()
        self._fitting: set[str] = set()
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
        shape = self.shape(name)
        # Before any memory is taken: a description may promise more than all files hold.
        for path, stored in self._where[name]:
            self._count(path, f"{kind}/{self._prefix}{name}", stored.count)
        self._check_fit(name)
        whole = torch.empty(math.prod(shape), dtype=torch.float32)
        self.read_into(kind, Piece(name, 0, math.prod(shape), shape, None, 0, shape), whole)
        return whole.view(shape)

    def weight(self, name: str) -> torch.Tensor:
        """float32[global shape], the weights alone."""
        return self.read(WEIGHT, name)

    def read_into(self, kind: str, wanted: Piece, target: torch.Tensor) -> None:
        """Fill target, float32[wanted.count] on the CPU, with what the wanted piece stands for; padding is zero."""
        self._check_fit(wanted.name)
        parts = segments(wanted)
        length = int(parts[:, LENGTH].sum())
        if length < wanted.count:
            target.zero_()
        filled = 0
        for path, stored in self._where[wanted.name]:
            common = overlaps(parts, segments(stored))
            if len(common):
                key = f"{kind}/{self._prefix}{wanted.name}"
                self._count(path, key, stored.count)
                self._copy(self._file(path, key), key, common, target)
                filled += int(common[:, LENGTH].sum())
        if filled != length:
            raise ValueError(
                f"{self.directory}: {filled} of {length} elements of {wanted.name} are there; a file is missing"
            )

    def read_piece(self, kind: str, wanted: Piece) -> torch.Tensor:
        """float32[wanted.count] on the CPU, as `read_into`."""
        found = torch.empty(wanted.count, dtype=torch.float32)
        self.read_into(kind, wanted, found)
        return found

    def has(self, kind: str, name: str) -> bool:
        """Whether this of a parameter was written: there are no moments of one that was frozen."""
        key = f"{kind}/{self._prefix}{name}"
        for path, piece in self._where[name]:
            if piece.count:
                return key in self._file(path, f"{WEIGHT}/{self._prefix}{name}")
        return False

    def _copy(self, file: TensorFile, key: str, common: np.ndarray, target: torch.Tensor) -> None:
        if len(common) == 1 and file.read_into(key, int(common[0, LOCAL]), _part(target, common[0])):
            return
        for part in _at_once(common):
            first, last = int(part[0, LOCAL]), int(part[-1, LOCAL] + part[-1, LENGTH])
            values = file.read(key, first, last).float()
            for to, begin, count in part.tolist():
                target[to : to + count] = values[begin - first : begin - first + count]

    def _check_fit(self, name: str) -> None:
        """Raise ValueError unless the pieces of a parameter are all of it, each element once."""
        if name in self._fitting:
            return
        shape = self.shape(name)
        shards: dict[int, list[Piece]] = defaultdict(list)
        for _, piece in self._where[name]:
            shards[piece.shard_start].append(piece)
        covered, end = 0, 0
        for begin, pieces in sorted(shards.items()):
            first = pieces[0]
            self._check_shard(name, pieces)
            # Where two overlap, the count could be right and a part of the whole be what the memory held before.
            if begin != end:
                raise ValueError(f"{self.directory}: the shards of {name} begin at {begin} and end at {end}")
            end += first.shard_shape[first.sharded_dim] if first.sharded_dim is not None else 0
            covered += sum(int(segments(piece)[:, LENGTH].sum()) for piece in pieces)
        if covered != math.prod(shape):
            raise ValueError(
                f"{self.directory}: {covered} of {math.prod(shape)} elements of {name} are there; a file is missing"
            )
        self._fitting.add(name)

    def _check_shard(self, name: str, pieces: list[Piece]) -> None:
        shape, filled = pieces[0].shard_shape, 0
        for piece in sorted(pieces, key=lambda piece: (piece.start, piece.count)):
            if piece.start != filled or piece.shard_shape != shape:
                raise ValueError(f"{self.directory}: the pieces of {name} do not fit each other; a file is missing")
            filled += piece.count
        if filled != math.prod(shape):
            raise ValueError(
                f"{self.directory}: {filled} of {math.prod(shape)} elements of a shard of {name} are there; "
                "a file is missing"
            )

    def _count(self, path: Path, key: str, expected: int) -> None:
        found = self._file(path, key).count(key)
        if found != expected:
            raise ValueError(f"{path} holds {found} elements of {key}, its description says {expected}")

    def _file(self, path: Path, key: str) -> TensorFile:
        """Raises ValueError if the file cannot be read, or lacks the tensor."""
        if path not in self._files:
            entry = self._index.files.get(path.name) if self._index else None
            if self._index and entry is None:
                raise ValueError(f"{path} is missing or damaged ({key}: it is not in {INDEX})")
            try:
                self._files[path] = TensorFile(path, entry, self._cache)
            except OSError as error:
                raise ValueError(f"{path} is missing or damaged ({key}: {error.strerror or error})") from error
            except ValueError as error:
                if str(path) in str(error):
                    raise
                raise ValueError(f"{path} is missing or damaged ({key}: {error})") from error
        if key not in self._files[path]:
            raise ValueError(f"{path} is missing or damaged ({key} is not in it)")
        return self._files[path]


def _part(target: torch.Tensor, common: np.ndarray) -> torch.Tensor:
    return target[int(common[GLOBAL]) : int(common[GLOBAL] + common[LENGTH])]


def _at_once(common: np.ndarray) -> Iterator[np.ndarray]:
    """`overlaps` in groups that reach over at most `_AT_ONCE` stored elements, long ones cut."""
    pieces = -(-common[:, LENGTH] // _AT_ONCE)
    if pieces.max() > 1:
        at = np.repeat(np.arange(len(common)), pieces)
        offset = (np.arange(len(at)) - np.repeat(pieces.cumsum() - pieces, pieces)) * _AT_ONCE
        length = np.minimum(common[at, LENGTH] - offset, _AT_ONCE)
        common = np.stack([common[at, GLOBAL] + offset, common[at, LOCAL] + offset, length], axis=1)
    start = 0
    while start < len(common):
        reach = common[:, LOCAL] + common[:, LENGTH] - common[start, LOCAL]
        stop = max(start + 1, int(np.searchsorted(reach, _AT_ONCE, side="right")))
        yield common[start:stop]
        start = stop
