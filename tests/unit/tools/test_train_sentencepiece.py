"""The tokenizer's text comes from every kind of source."""

import json
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_gemini.config.data import SourceConfig
from tests.tiny_shards import chat, document, write_tar
from tools.train_sentencepiece import Corpus, corpus_of, lines, main, usual_size


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


def test_the_default_size_follows_the_words_of_the_text_and_has_room_for_its_characters():
    def words(count):
        return [" ".join(f"w{number}" for number in range(begin, begin + 50)) for begin in range(0, count, 50)]

    assert [usual_size(words(count)) for count in (50, 2000, 9000, 40_000)] == [512, 512, 2048, 8192]
    assert usual_size(words(2000) * 20) == 512  # what is said again is nothing new
    chinese = ["".join(map(chr, range(0x4E00, 0x4E00 + 3000)))]
    assert usual_size(chinese) == 8192
    assert usual_size([]) == 512


def test_no_option_is_needed_for_many_characters_and_none_is_named_that_was_not_given(tmp_path, capsys):
    text = "".join(map(chr, range(0x4E00, 0x4E00 + 600)))
    lines_of = [json.dumps({"text": text[begin : begin + 20]}) for begin in range(0, 600, 5)]
    (tmp_path / "x.jsonl").write_text("\n".join(lines_of) + "\n")
    config = f"data: {{text_model: {tmp_path}/m.model, sources: [{{shards: {tmp_path}/x.jsonl, task: text}}]}}"
    (tmp_path / "run.yaml").write_text(config)
    assert main(["--config", str(tmp_path / "run.yaml")]) == 0
    printed = capsys.readouterr().out
    assert "pieces (at most 2048 for so much text; --vocab-size N gives another number)" in printed
    assert main(["--config", str(tmp_path / "run.yaml"), "--vocab-size", "512"]) == 2
    assert "--vocab-size is 512, and the text's characters alone take" in capsys.readouterr().err
