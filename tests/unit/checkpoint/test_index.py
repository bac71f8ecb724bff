"""No damage of an index passes: one line that names it, or what was saved."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_gemini.checkpoint.directory import verify
from megatron_gemini.checkpoint.index import INDEX, RunId, decode, read_index, seal


@pytest.fixture(scope="module")
def sealed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("sealed")
    for name in ("config.yaml", "rank-00000.json", "image_tokenizer/config.yaml"):
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(name)
    seal(directory, RunId("a" * 32, "b" * 32), 7)
    return directory


def refused(directory: Path) -> str:
    with pytest.raises(ValueError, match=r"\S") as error:
        verify(directory)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_every_flip_of_a_bit_is_refused_in_one_line_or_changes_nothing(sealed: Path) -> None:
    whole, expected = (sealed / INDEX).read_bytes(), read_index(sealed)
    passed = 0
    for place in range(len(whole)):
        for bit in range(8):
            flipped = bytearray(whole)
            flipped[place] ^= 1 << bit
            try:
                found = decode(bytes(flipped))
            except ValueError as error:
                assert "\n" not in str(error)
            else:
                assert found == expected  # white space, or another way to write the same letter
                passed += 1
    assert passed < len(whole) / 4


@given(st.data())
def test_no_cut_or_other_content_passes(sealed: Path, data: st.DataObject) -> None:
    whole = (sealed / INDEX).read_bytes()
    json_values = st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
        max_leaves=8,
    )
    cut = st.integers(0, len(whole) - 1).map(lambda size: whole[:size])
    content = cut | st.binary(max_size=50) | json_values.map(lambda value: json.dumps(value).encode())
    with pytest.raises(ValueError, match=r"\S") as error:
        decode(data.draw(content))
    assert "\n" not in str(error.value)


def crafted(directory: Path, **changes: object) -> None:
    """An index whose own hash is right, as somebody who means it would write it."""
    content = json.loads((directory / INDEX).read_text()) | changes
    content.pop("sha256")
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    (directory / INDEX).write_text(json.dumps(content | {"sha256": hashlib.sha256(text.encode()).hexdigest()}))


ENTRY = {"bytes": 1, "xxh3": "0" * 32}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"files": {}}, "lists no files"),
        ({"files": {"../config.yaml": ENTRY}}, "is no name of a file"),
        ({"files": {"/etc/passwd": ENTRY}}, "is no name of a file"),
        ({"files": {"./config.yaml": ENTRY}}, "is no name of a file"),
        ({"files": {"a\0b": ENTRY}}, "is no name of a file"),
        ({"files": {"config.yaml": [1, "0"]}}, "does not say the bytes"),
        ({"files": {"config.yaml": {"bytes": "1", "xxh3": "0" * 32}}}, "does not say the bytes"),
        ({"files": {"config.yaml": {"bytes": 1, "xxh3": "0" * 64}}}, "does not say the bytes"),
        ({"files": {"config.yaml": {"bytes": 0, "xxh3": "0" * 32}}}, "does not say the bytes"),
        ({"files": [1]}, "is not what it should be"),
        ({"serial": True}, "is not what it should be"),
        ({"run": 3}, "is not what it should be"),
        ({"more": 3}, "its own hash differs"),
        ({"format": 2}, "this version reads format 3"),
        ({"format": [3]}, "no format number"),
    ],
)
def test_a_crafted_index_is_refused(sealed: Path, changes: dict[str, object], said: str) -> None:
    whole = (sealed / INDEX).read_bytes()
    try:
        crafted(sealed, **changes)
        assert said in refused(sealed)
    finally:
        (sealed / INDEX).write_bytes(whole)


@pytest.mark.parametrize("name", ["rank-00001.json", "image_tokenizer/extensions.json", "image_tokenizer/index.json"])
def test_a_file_that_is_not_listed_is_refused(sealed: Path, name: str) -> None:
    (sealed / name).write_text("{}")
    try:
        assert f"{name} is not in index.json" in refused(sealed)
    finally:
        (sealed / name).unlink()


def test_a_file_that_is_listed_twice_is_refused(sealed: Path) -> None:
    whole = (sealed / INDEX).read_text()
    try:
        (sealed / INDEX).write_text(whole.replace('"files": {', '"files": {"config.yaml": {},'))
        assert "twice" in refused(sealed)
    finally:
        (sealed / INDEX).write_text(whole)


def test_a_file_of_the_carried_tokenizer_that_is_gone_is_named(sealed: Path) -> None:
    (sealed / "image_tokenizer/config.yaml").unlink()
    try:
        assert "image_tokenizer/config.yaml is missing" in refused(sealed)
    finally:
        (sealed / "image_tokenizer/config.yaml").write_text("image_tokenizer/config.yaml")
