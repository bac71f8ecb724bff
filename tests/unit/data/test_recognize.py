"""A file that cannot be read as it is, is told what it is and what to do, by its content and wherever it is given."""

import bz2
import gzip
import json
import lzma
import zipfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_gemini.config.data import SourceConfig
from megatron_gemini.data.sources.recognize import recognize
from megatron_gemini.data.sources.records import open_records
from tests.tiny_shards import texts
from tools import inspect_shards

LINES = b'{"text": "a"}\n{"text": "b"}\n'


def write(folder, kind, name):
    path = folder / name
    packed = {"gzip": gzip.compress, "bzip2": bz2.compress, "xz": lzma.compress}
    if kind in packed:
        path.write_bytes(packed[kind](LINES * 50))
    elif kind == "zip":
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("a.txt", "a")
    elif kind == "array":
        path.write_text(json.dumps([{"text": "a"}, {"text": "b"}], indent=1))
    elif kind == "UTF-16":
        path.write_bytes(LINES.decode().encode("utf-16"))
    elif kind == "Arrow":
        table = pa.table({"text": ["a"]})
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
    return str(path)


KINDS = ["gzip", "bzip2", "xz", "zip", "array", "UTF-16", "Arrow"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["x.json", "x.jsonl", "x.parquet", "x.tar", "x.jsonl.gz", "x.tar.gz"])
def test_a_source_is_told_what_its_file_is(tmp_path, kind, name):
    path = write(tmp_path, kind, name)
    expected = {"array": "one JSON array: write its entries as lines"}.get(kind, kind)
    with pytest.raises(ValueError, match=rf"x\.{name[2:]}'.* is .*{expected}"):
        open_records(SourceConfig(shards=path), ["text"])


@pytest.mark.parametrize("kind", KINDS)
def test_inspecting_tells_it_too(tmp_path, kind, capsys):
    assert inspect_shards.main([write(tmp_path, kind, "x.tar")]) == 2
    expected = {"array": "one JSON array: write its entries as lines"}.get(kind, kind)
    assert expected in capsys.readouterr().err


def test_inspecting_tells_of_good_tables_that_a_run_reads_them(tmp_path, capsys):
    (tmp_path / "x.jsonl").write_bytes(b"\xef\xbb\xbf" + LINES)
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "x.parquet")
    for name, what in (("x.jsonl", "a file of JSON lines"), ("x.parquet", "a parquet file")):
        assert inspect_shards.main([f"{tmp_path}/{name}"]) == 2
        assert f"{name}' is {what}; a run reads it as it is" in capsys.readouterr().err
        assert len(open_records(SourceConfig(shards=f"{tmp_path}/{name}"), ["text"])) > 0
    assert open_records(SourceConfig(shards=f"{tmp_path}/x.jsonl"), ["text"]).read(0, ["text"]) == {"text": b"a"}


def test_a_tar_and_what_is_not_known_are_nothing_else(tmp_path):
    assert recognize(texts(tmp_path / "x.tar", 2)) == ""
    (tmp_path / "y").write_bytes(b"anything")
    assert recognize(str(tmp_path / "y")) == ""
