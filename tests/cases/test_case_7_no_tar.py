"""Case 7: files that are no tars, looked at and read."""

import gzip

import pytest

from megatron_gemini.config.data import SourceConfig
from megatron_gemini.data.sources.records import open_records
from tests.cases.tiny_run import turns, write_records
from tools import inspect_shards


def test_a_good_table_and_a_compressed_one_are_told_what_they_are(tmp_path, capsys):
    path = write_records(tmp_path / "good.jsonl", [{"messages": turns(f"tell me {i}", f"ok {i}")} for i in range(30)])
    packed = tmp_path / "good.jsonl.gz"
    packed.write_bytes(gzip.compress((tmp_path / "good.jsonl").read_bytes()))
    assert inspect_shards.main([path]) == 2
    told = capsys.readouterr().err
    assert "good.jsonl' is a file of JSON lines; a run reads it as it is" in told
    assert "damaged" not in told
    with pytest.raises(ValueError, match=r"good\.jsonl\.gz'.*it is compressed with gzip.*unpack it with gunzip"):
        open_records(SourceConfig(shards=str(packed), task="chat"), ["json"])
