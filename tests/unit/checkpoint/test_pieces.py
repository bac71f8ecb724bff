"""Descriptions of pieces that this trainer has not written: one line, and no memory for what is not there."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from megatron_gemini.checkpoint.piece import Piece
from megatron_gemini.checkpoint.pieces import PieceReader

HALF = {"start": 0, "count": 6, "shard_shape": [2, 3], "sharded_dim": 0, "shard_start": 0, "global_shape": [4, 3]}


def write(directory: Path, *ranks: dict[str, Any], count: int = 6) -> Path:
    """A piece of the parameter `w` for each rank."""
    for rank, piece in enumerate(ranks):
        stem = directory / f"rank-{rank:05d}"
        tensor = torch.arange(count) + 10.0 * rank
        save_file({"weight/w": tensor}, stem.with_suffix(".safetensors"))
        stem.with_suffix(".json").write_text(json.dumps({"pieces": [{"name": "w", **piece}], "data": {}}))
    return directory


def test_pieces_become_the_whole(tmp_path: Path) -> None:
    reader = PieceReader(write(tmp_path, HALF, HALF | {"shard_start": 2}))
    assert reader.weight("w").tolist() == [[0, 1, 2], [3, 4, 5], [10, 11, 12], [13, 14, 15]]
    assert reader.has("weight", "w") and not reader.has("exp_avg", "w")


@pytest.mark.parametrize(
    "change",
    [
        {"name": 3},
        {"start": "0"},
        {"start": -1},
        {"count": True},
        {"count": 7},
        {"shard_shape": 6},
        {"shard_shape": [2, 2]},
        {"shard_shape": ["2", 3]},
        {"shard_shape": [6]},
        {"shard_shape": [2, -3]},
        {"sharded_dim": 2},
        {"sharded_dim": -1},
        {"sharded_dim": None},
        {"sharded_dim": "0"},
        {"shard_start": None},
        {"shard_start": 1 << 70},
        {"global_shape": {"4": 3}},
        {"global_shape": None},
    ],
)
def test_a_crafted_piece_is_refused_in_one_line(change: dict[str, Any], tmp_path: Path) -> None:
    write(tmp_path, HALF | change, HALF | {"shard_start": 2})
    with pytest.raises(ValueError, match=r"rank-00000\.json is not a readable description of pieces") as error:
        PieceReader(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("ranks", "said"),
    [
        ([HALF | {"global_shape": [1 << 40, 3]}, HALF], "has another shape of w"),
        ([HALF | {"global_shape": [1 << 40, 3]}], "6 of 3298534883328 elements"),
        ([HALF, HALF], "do not fit each other"),
        ([HALF, HALF | {"shard_start": 1}], "begin at 1 and end at 2"),
        ([HALF, HALF | {"shard_start": 3}], "begin at 3 and end at 2"),
        ([HALF], "6 of 12 elements of w are there; a file is missing"),
        ([HALF | {"start": 0, "count": 3}, HALF], "rank-00000.safetensors holds 6 elements"),
    ],
)
def test_pieces_that_do_not_fit_are_refused_before_memory_is_taken(
    ranks: list[dict[str, Any]], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    true: Callable[..., torch.Tensor] = torch.empty

    def bounded(size: Any, **given: Any) -> torch.Tensor:
        assert torch.Size([size] if isinstance(size, int) else size).numel() < 1000
        return true(size, **given)

    monkeypatch.setattr(torch, "empty", bounded)
    write(tmp_path, *ranks)
    with pytest.raises(ValueError, match=said.replace(".", r"\.")):
        PieceReader(tmp_path).weight("w")


def test_a_tensor_that_is_not_in_the_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"rank-00000\.safetensors is missing or damaged \(exp_avg/w is not in it\)"):
        PieceReader(write(tmp_path, HALF, HALF | {"shard_start": 2})).read("exp_avg", "w")


PLAIN = st.none() | st.booleans() | st.integers() | st.text(max_size=3) | st.lists(st.integers(0, 4), max_size=3)


@given(st.dictionaries(st.sampled_from([*HALF, "name"]), PLAIN) | PLAIN)
def test_any_json_gives_a_piece_or_an_error_that_is_expected(value: Any) -> None:
    with contextlib.suppress(ValueError, KeyError, TypeError):
        Piece.from_json({"name": "w", **HALF, **value} if isinstance(value, dict) else value)
