"""The tokenizer's text comes from every kind of source."""

import json
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_gemini.config.data import SourceConfig
from tests.tiny_shards import chat, document, write_tar
from tools.train_sentencepiece import Corpus, corpus_of, lines


def texts(*sources, limit=100):
    skipped: Counter[str] = Counter()
    return list(lines(Corpus(list(sources), ["p {text}"]), limit, skipped)), skipped


def test_texts_of_tables_documents_and_conversations_are_read(tmp_path):
    pq.write_table(pa.table({"body": ["one", "two"], "bytes": [b"x", b"y"]}), tmp_path / "a.parquet")
    (tmp_path / "b.jsonl").write_text('{"text": "three"}\nnonsense\n')
    (tmp_path / "c.jsonl").write_text(json.dumps({"texts": ["four", None], "images": [None, "x.png"]}) + "\n")
    tar = write_tar(tmp_path / "d.tar", [("c", chat(5))])
    found, skipped = texts(
        SourceConfig(shards=f"{tmp_path}/a.parquet", task="text", fields={"text": ("body",)}),
        SourceConfig(shards=f"{tmp_path}/b.jsonl", task="text"),
        SourceConfig(shards=f"{tmp_path}/c.jsonl", task="interleave"),
        SourceConfig(shards=tar, task="chat"),
    )
    assert found[::2] == ["one", "two", "three", "four", "this?", "one 5", "two"]
    assert found[1::2] == [f"p {text}" for text in found[::2]]
    assert skipped == {"bad_json": 1}


def test_shards_without_a_config_may_hold_captions_and_documents(tmp_path):
    write_tar(tmp_path / "a.tar", [("a", {"txt": b"caption", "json": b'{"caption": "other"}'}), ("b", document(3))])
    corpus, model = corpus_of([f"{tmp_path}/*.tar"], None)
    assert model == ""
    found = list(lines(Corpus(corpus.sources, ["{text}"]), 10, Counter()))
    assert found == ["caption"] * 2 + ["one 3"] * 2
    (tmp_path / "run.yaml").write_text(
        f"data: {{sources: [{{shards: '{tmp_path}/*.tar'}}, {{shards: '{tmp_path}/*.tar', task: text}}]}}"
    )
    assert len(corpus_of((), str(tmp_path / "run.yaml"))[0].sources) == 1


def test_half_a_character_and_a_record_of_no_kind_are_skipped_and_counted(tmp_path):
    half = {"messages": [{"role": "user", "content": "cut \ud83d"}, {"role": "assistant", "content": "a"}]}
    (tmp_path / "c.jsonl").write_text(json.dumps(half) + "\n" + '{"messages": 3}\n')
    (tmp_path / "t.jsonl").write_text('{"text": "good"}\n{"text": "\\ud83d"}\n')
    found, skipped = texts(
        SourceConfig(shards=f"{tmp_path}/c.jsonl", task="chat"),
        SourceConfig(shards=f"{tmp_path}/t.jsonl", task="text"),
    )
    assert found == ["good", "p good"]
    assert skipped == {"bad_text": 2, "bad_json": 1}
