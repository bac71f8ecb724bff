"""Tables, tars and stores give their samples by number, and what strangers name in them stays inside their folder."""

import json
import os
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_gemini.config.data import SourceConfig
from megatron_gemini.data.sources import jsonl
from megatron_gemini.data.sources import parquet as parquet_files
from megatron_gemini.data.sources.attachments import read_attachment
from megatron_gemini.data.sources.jsonl import JsonLines
from megatron_gemini.data.sources.parquet import Parquet
from megatron_gemini.data.sources.paths import expand_shards, open_binary
from megatron_gemini.data.sources.records import open_records
from megatron_gemini.modalities.bad_sample import BadSample
from tests.tiny_shards import keys_of, write_tar


def write(path, data):
    path.write_bytes(data)
    return str(path)


@settings(max_examples=60, deadline=None)
@given(
    lines=st.lists(st.text("ab", max_size=7).map(lambda t: json.dumps({"text": t}).encode()), min_size=1, max_size=70),
    ended=st.booleans(),
    piece=st.integers(1, 40),
)
def test_every_line_is_found_by_its_number(tmp_path_factory, lines, ended, piece):
    path = write(tmp_path_factory.getbasetemp() / "x.jsonl", b"\n".join(lines) + b"\n" * ended)
    before, jsonl._PIECE = jsonl._PIECE, piece
    try:
        records = JsonLines([path])
        assert len(records) == len(lines)
        assert [records.read(i, ["json"])["json"].rstrip() for i in range(len(lines))] == lines
    finally:
        jsonl._PIECE = before


def test_a_table_is_numbered_over_its_files_and_gives_columns_as_bytes(tmp_path):
    first = write(tmp_path / "a.jsonl", b'{"text": "one", "n": 3, "none": null}\n{"text": "two"}\n')
    second = write(tmp_path / "b.jsonl", b'{"text": ["x"]}')
    records = JsonLines([first, second])
    assert keys_of(records) == ["a/0", "a/1", "b/0"]
    assert records.bounds == [0, 2, 3]
    assert records.read(0, ["text", "n", "none", "absent"]) == {"text": b"one", "n": b"3"}
    assert records.read(2, ["text"]) == {"text": b'["x"]'}
    assert records.path(2) == second
    with pytest.raises(IndexError):
        records.read(3, ["text"])


@pytest.mark.parametrize(
    ("line", "reason"),
    [(b"", "bad_json"), (b"[1]", "bad_json"), (b"[" * 100_000, "bad_json"), (b'{"a":' + b'"x' * 40, "text_too_large")],
)
def test_a_bad_line_costs_only_itself(tmp_path, monkeypatch, line, reason):
    monkeypatch.setattr(jsonl, "MAX_LINE", 60 if reason == "text_too_large" else 1 << 20)
    records = JsonLines([write(tmp_path / "x.jsonl", b'{"text": "a"}\n' + line + b'\n{"text": "c"}\n')])
    with pytest.raises(BadSample) as error:
        records.read(1, ["text"])
    assert error.value.reason == reason
    assert [records.read(i, ["text"])["text"] for i in (0, 2)] == [b"a", b"c"]


def test_an_empty_table_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"x\.jsonl' holds no record"):
        JsonLines([write(tmp_path / "x.jsonl", b"")])


def parquet(path, rows, group=4):
    table = pa.table(
        {
            "text": [f"t{i}" for i in rows],
            "image": [{"bytes": b"%d" % i, "path": None} for i in rows],
            "score": [i / 10 for i in rows],
        }
    )
    pq.write_table(table, path, row_group_size=group)
    return str(path)


def test_parquet_is_read_by_row_groups_and_only_the_columns_that_are_wanted(tmp_path, monkeypatch):
    paths = [parquet(tmp_path / "a.parquet", range(10)), parquet(tmp_path / "b.parquet", range(10, 13))]
    records = Parquet(paths, ["text", "image", "absent"])
    assert list(records.bounds) == [0, 4, 8, 10, 13]
    assert records.window == 4 * 13 // 4
    order = np.random.default_rng(0).permutation(13).tolist()
    found = [records.read(i, ["text", "image"]) for i in order]
    assert found == [{"text": f"t{i}".encode(), "image": b"%d" % i} for i in order]
    assert all(table.column_names == ["text", "image"] for table in records._groups.values())
    whole = Parquet(paths, ["json"]).read(12, ["json"])["json"]
    name = 'column:["image"]'  # by which the bytes can be asked for
    assert json.loads(whole) == {"text": "t12", "image": name, "score": 1.2}
    assert Parquet(paths, ["json"]).read(12, [name]) == {name: b"12"}
    with pytest.raises(ValueError, match="has the columns text, image, score, none of txt"):
        Parquet(paths, ["txt"])
    with pytest.raises(ValueError, match="cannot read"):
        Parquet([write(tmp_path / "c.parquet", b"PAR1 no")], ["text"])


def test_few_row_groups_are_kept(tmp_path):
    records = Parquet([parquet(tmp_path / "a.parquet", range(60), group=2)], ["text"])
    for sample in range(60):
        records.read(sample, ["text"])
    assert len(records._groups) == 9


def test_the_format_goes_by_the_ending_and_mixtures_are_refused(tmp_path):
    write(tmp_path / "a.jsonl", b'{"text": "a"}\n')
    parquet(tmp_path / "b.parquet", range(3))
    assert isinstance(open_records(SourceConfig(shards=f"{tmp_path}/*.jsonl"), ["text"]), JsonLines)
    with pytest.raises(ValueError, match="jsonl and parquet files; make two"):
        open_records(SourceConfig(shards=f"{tmp_path}/{{a.jsonl,b.parquet}}"), ["text"])


def test_a_store_is_expanded_and_read_like_a_folder(tmp_path):
    local = write_tar(tmp_path / "t-0.tar", [("a", {"txt": b"1"}), ("b", {"txt": b"2", "png": b"p"})])
    store = fsspec.filesystem("memory")
    for number in range(3):
        store.pipe(f"/place/t-{number}.tar", Path(local).read_bytes())
    store.pipe("/place/x.jsonl", b'{"text": "far"}\n')
    urls = [f"memory://place/t-{n}.tar" for n in range(3)]
    assert expand_shards("memory://place/t-*.tar") == expand_shards("memory://place/t-{0..2}.tar") == urls
    with pytest.raises(ValueError, match="no shard matches 'memory://place/t-3"):
        expand_shards("memory://place/t-{0..3}.tar")
    tars = open_records(SourceConfig(shards="memory://place/t-*.tar"), ["txt"])
    assert keys_of(tars) == ["a", "b"] * 3
    assert tars.read(5, ["png", "txt", "wav"]) == {"png": b"p", "txt": b"2"}
    assert open_records(SourceConfig(shards="memory://place/x.jsonl"), ["text"]).read(0, ["text"]) == {"text": b"far"}
    assert read_attachment("memory://place/x.jsonl", "t-9.tar") is None
    assert read_attachment("memory://place/x.jsonl", "t-0.tar")[:1] == b"a"


@pytest.mark.parametrize("path", ["pipe:cat x", "pipe://x", "http://host/x.tar", "simplecache::s3://b/x", "ssh://h/x"])
def test_nothing_is_run_or_fetched_for_a_path(path):
    for touch in (expand_shards, open_binary):
        with pytest.raises(ValueError, match="is no path that data is read from"):
            touch(path)


def test_an_attachment_lies_in_the_folder_of_its_shard(tmp_path, monkeypatch):
    folder = tmp_path / "data"
    (folder / "images").mkdir(parents=True)
    write(folder / "images" / "a.png", b"in")
    write(tmp_path / "secret", b"out")
    os.symlink(tmp_path / "secret", folder / "link.png")
    shard = write(folder / "x.jsonl", b"{}")
    assert read_attachment(shard, "images/a.png") == b"in"
    assert read_attachment(shard, "images/b.png") is None
    monkeypatch.chdir(folder)
    assert read_attachment("x.jsonl", "images/a.png") == b"in"
    for name in (
        "../secret",
        str(tmp_path / "secret"),
        "link.png",
        "images/../../secret",
        "",
        "a\\b",
        "file:///x",
        ".",
    ):
        with pytest.raises(BadSample) as error:
            read_attachment(shard, name)
        assert error.value.reason == "unsafe_name"


def test_row_groups_are_kept_by_their_bytes_and_large_ones_are_shuffled_in_smaller_windows(tmp_path, monkeypatch):
    path = tmp_path / "a.parquet"
    text = pa.table({"text": [f"{i:06d}" * 50 for i in range(120)], "other": ["x" * 1000] * 120})
    pq.write_table(text, path, row_group_size=10, use_dictionary=False, compression="none")
    one = Parquet([str(path)], ["text"])._largest
    assert 3000 < one < 6000  # of the columns that are read alone
    for room, together in ((100, 4), (9, 4), (7, 3), (5, 2), (3, 1), (1, 1), (0.5, 1)):
        monkeypatch.setattr(parquet_files, "KEPT_BYTES", int(room * one))
        records = Parquet([str(path)], ["text"])
        assert records.window == together * 10
        kept = []
        for sample in range(120):
            records.read(sample, ["text"])
            kept.append([table.nbytes for table in records._groups.values()])
        assert all(sum(sizes) <= parquet_files.KEPT_BYTES or len(sizes) <= 2 for sizes in kept)
        # What two windows need, and no more than ever.
        assert min(max(2, 2 * together), 9) <= max(map(len, kept)) <= 9
    monkeypatch.setattr(parquet_files, "MAX_GROUP_BYTES", one - 1)
    with pytest.raises(ValueError, match=r"a row group of .* has .* bytes; write it with at most"):
        Parquet([str(path)], ["text"])


def test_a_column_of_maps_is_read_by_key(tmp_path):
    maps = pa.array([[("de", "rot"), ("en", "red")]], pa.map_(pa.string(), pa.string()))
    pq.write_table(pa.table({"text": maps}), tmp_path / "x.parquet")
    assert Parquet([str(tmp_path / "x.parquet")], ["text"]).read(0, ["text"]) == {"text": b'{"de": "rot", "en": "red"}'}
