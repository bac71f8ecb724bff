"""Any layout reads from any other exactly its own elements, and each about once."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_gemini.checkpoint import blocks
from megatron_gemini.checkpoint.index import seal
from megatron_gemini.checkpoint.piece import WEIGHT, Piece, cut
from megatron_gemini.checkpoint.pieces import PieceReader
from megatron_gemini.checkpoint.ranges import LENGTH, overlaps, segments
from megatron_gemini.checkpoint.tensor_file import Outgoing, write_tensors


def divide(shape: tuple[int, ...], dim: int | None, tensor: int, zero: int) -> list[Piece]:
    """A parameter over `tensor` shards along `dim`, padded to equal ones, each over `zero` ranks in equal parts."""
    pieces, size = [], 0 if dim is None else -(-shape[dim] // tensor)
    for shard in range(1 if dim is None else tensor):
        of_shard = shape if dim is None else (*shape[:dim], size, *shape[dim + 1 :])
        whole = math.prod(of_shard)
        each = -(-whole // zero)
        for rank in range(zero):
            start = min(rank * each, whole)
            pieces.append(Piece("w", start, min(each, whole - start), of_shard, dim, shard * size, shape))
    return pieces


def layouts(shape: tuple[int, ...]) -> st.SearchStrategy[list[Piece]]:
    return st.builds(
        divide,
        st.just(shape),
        st.none() | st.integers(0, len(shape) - 1),
        st.integers(1, 4),
        st.integers(1, 5),
    )


SHAPES = st.lists(st.integers(1, 7), min_size=1, max_size=3).map(tuple)


@given(SHAPES.flatmap(lambda shape: st.tuples(st.just(shape), layouts(shape), layouts(shape))))
def test_every_piece_of_a_layout_is_made_of_those_of_another(given_: tuple[tuple[int, ...], Any, Any]) -> None:
    shape, stored, wanted = given_
    whole = torch.arange(1.0, math.prod(shape) + 1).view(shape)
    contents = [cut(whole, piece) for piece in stored]
    for piece in wanted:
        found = torch.zeros(piece.count)
        for theirs, content in zip(stored, contents, strict=True):
            for to, begin, count in overlaps(segments(piece), segments(theirs)).tolist():
                assert not found[to : to + count].any()  # each element comes once
                found[to : to + count] = content[begin : begin + count]
        assert torch.equal(found, cut(whole, piece))


def test_the_elements_of_a_layout_are_those_of_the_parameter() -> None:
    pieces = divide((7, 6), 0, 4, 3)
    assert sum(int(segments(piece)[:, LENGTH].sum()) for piece in pieces) == 42


def write(directory: Path, whole: torch.Tensor, ranks: Sequence[Piece]) -> Path:
    """A checkpoint with a piece a rank."""
    directory.mkdir()
    entries = {}
    for rank, piece in enumerate(ranks):
        stem = directory / f"rank-{rank:05d}"
        content = cut(whole, piece).clone()
        weights = stem.with_suffix(".safetensors")
        written = Outgoing(f"{WEIGHT}/w", (piece.count,), torch.float32, lambda content=content: content)
        entries[weights.name] = write_tensors(weights, [written])
        stem.with_suffix(".json").write_text(json.dumps({"pieces": [piece.to_json()], "data": {}}))
    seal(directory, entries=entries)
    return directory


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK", 64)


@pytest.mark.parametrize("dim", [0, 1, None])
def test_ranks_together_read_every_byte_about_once(
    dim: int | None, small_blocks: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = torch.randn(64, 48)
    directory = write(tmp_path / "saved", whole, divide((64, 48), 0, 2, 3))
    size = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    read, true = [0], os.preadv

    def counted(file: int, buffers: Any, start: int) -> int:
        count = true(file, buffers, start)
        read[0] += count
        return count

    monkeypatch.setattr(os, "preadv", counted)
    wanted = divide((64, 48), dim, 4, 1) if dim is not None else divide((64, 48), None, 1, 4)
    for piece in wanted:
        read_before = read[0]
        assert torch.equal(PieceReader(directory).read_piece(WEIGHT, piece), cut(whole, piece))
        # Columns lie in all files, and rows of 48 elements in blocks of 16: half of what is read is a neighbor's.
        assert read[0] - read_before < (0.45 if dim != 1 else 1.2) * size
    assert read[0] < (1.3 if dim != 1 else 4.8) * size


def test_no_flipped_bit_is_ever_read(small_blocks: None, tmp_path: Path) -> None:
    whole = torch.randn(8, 5)
    directory = write(tmp_path / "saved", whole, divide((8, 5), 0, 2, 2))
    for path in sorted(directory.glob("*.safetensors")):
        right = path.read_bytes()
        for place in range(len(right)):
            flipped = bytearray(right)
            flipped[place] ^= 1 << place % 8
            path.write_bytes(flipped)
            with pytest.raises(ValueError, match=r"its hash differs|missing or damaged") as error:
                PieceReader(directory).read(WEIGHT, "w")
            assert path.name in str(error.value) and "\n" not in str(error.value)
        path.write_bytes(right)
    assert torch.equal(PieceReader(directory).weight("w"), whole)


def test_damage_that_a_rank_does_not_read_is_none_of_its_business(small_blocks: None, tmp_path: Path) -> None:
    whole, halves = torch.randn(64, 8), divide((64, 8), 0, 2, 1)
    directory = write(tmp_path / "saved", whole, halves)
    (path,) = directory.glob("rank-00001.safetensors")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert torch.equal(PieceReader(directory).read_piece(WEIGHT, halves[0]), cut(whole, halves[0]))
    with pytest.raises(ValueError, match=r"rank-00001\.safetensors is not what was saved"):
        PieceReader(directory).read_piece(WEIGHT, halves[1])
