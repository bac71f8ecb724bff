"""Case 5: a column that holds a list of captions."""

from tests.cases.tiny_run import configure, learn, texts_of, write_records


def test_a_document_s_tokens_are_one_of_the_captions(tmp_path):
    records = [{"text": ["a red thing", "a color"]} for _ in range(24)]
    config = configure(tmp_path, write_records(tmp_path / "listcap.jsonl", records), task="text")
    rows, _, skipped = learn(config, 2)
    assert not skipped
    for row in rows:
        assert texts_of(row, config) == ["a red thing"] * len(row.samples)
