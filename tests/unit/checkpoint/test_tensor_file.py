"""Files of tensors that are written one by one: the library reads them, and their entries are those of their bytes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from megatron_gemini.checkpoint import blocks, tensor_file
from megatron_gemini.checkpoint.blocks import BlockCache, BlockHash, hash_file
from megatron_gemini.checkpoint.tensor_file import Outgoing, TensorFile, write_tensors

TENSORS = {
    "a": torch.randn(3, 4),
    "b": torch.randn(7).bfloat16(),
    "none": torch.empty(0),
    "scalar": torch.tensor(2.5, dtype=torch.float64),
    "turned": torch.randn(4, 6).t(),
}


def write(path: Path) -> blocks.Entry:
    return write_tensors(
        path, [Outgoing(n, tuple(t.shape), t.dtype, lambda tensor=t: tensor) for n, t in TENSORS.items()]
    )


@pytest.mark.parametrize("block", [16, 50, 1 << 23])
def test_the_library_reads_what_is_written_and_the_entry_is_that_of_the_file(
    block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "BLOCK", block)
    monkeypatch.setattr(tensor_file, "_PART", 13)
    entry = write(tmp_path / "a.safetensors")
    assert entry == hash_file(tmp_path / "a.safetensors")
    found = load_file(tmp_path / "a.safetensors")
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], TENSORS[name]) and found[name].dtype == TENSORS[name].dtype for name in found)
    file = TensorFile(tmp_path / "a.safetensors", entry, BlockCache())
    assert torch.equal(file.read("b", 2, 5), TENSORS["b"][2:5]) and "c" not in file and file.count("a") == 12


@given(st.lists(st.binary(max_size=40)))
def test_a_hash_does_not_depend_on_the_parts_in_which_a_file_is_written(parts: list[bytes]) -> None:
    apart, at_once = BlockHash(), BlockHash()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "BLOCK", 16)
        for part in parts:
            apart.update(part)
        at_once.update(b"".join(parts))
        assert apart.entry() == at_once.entry()
        assert len(apart.entry().hashes) == blocks.DIGITS * blocks.block_count(apart.entry().size)


def header(**changes: object) -> bytes:
    text = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes}).encode()
    return len(text).to_bytes(8, "little") + text + b"\0" * 8


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\1",
        (1 << 40).to_bytes(8, "little"),
        (4).to_bytes(8, "little") + b"nope",
        (2).to_bytes(8, "little") + b"[]",
        header(dtype="I4"),
        header(dtype=[1]),
        header(shape=3),
        header(shape=[3]),
        header(shape=[-2]),
        header(shape=["2"]),
        header(data_offsets=[0, 16]),
        header(data_offsets=[8, 16], shape=[2]),
        header(data_offsets=[-8, 0]),
        header(data_offsets=[0]),
        header(data_offsets=[0, 1 << 62], shape=[1 << 60]),
    ],
)
def test_a_file_that_is_damaged_or_crafted_is_a_value_error(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="header"):
        TensorFile(tmp_path / "a.safetensors", None, BlockCache())
