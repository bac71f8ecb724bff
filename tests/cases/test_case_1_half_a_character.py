"""Case 1: half an emoji in one conversation of thirty."""

import math

import pytest

from tests.cases.tiny_run import configure, learn, turns, write_records


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_and_its_text_tokenizer_go_on_without_the_record(tmp_path, workers):
    records = [{"messages": turns(f"tell me {i}", f"ok {i}")} for i in range(30)]
    records[17] = {"messages": turns("cut emoji \ud83d", "ok")}
    config = configure(tmp_path, write_records(tmp_path / "surrogate.jsonl", records), workers=workers)
    rows, losses, skipped = learn(config)
    assert len(rows) == 8
    assert all(map(math.isfinite, losses))
    assert set(skipped) == {("chat:surrogate.jsonl", "bad_text")}
    assert not any(key.endswith("/17") for row in rows for key in row.samples)
