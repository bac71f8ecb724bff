"""Sources of every kind give documents from a few lines of configuration, and a filter is no fault of the data."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_gemini.config.data import SourceConfig
from megatron_gemini.data.loading.loader import Loader
from tests.tiny_shards import FORM, LAYOUT, Characters, png, run_config, wav, write_tar


def loader(*sources, **data):
    return Loader(run_config(sources, lanes=2, **data), 0, 1, LAYOUT, Characters(), FORM)


def words(document):
    """Text as it is, placeholders as #, other control tokens as |."""
    inputs = {LAYOUT.control(name) for name in ("image", "video", "audio")}
    return "".join(chr(t) if LAYOUT.is_text(t) else "#" if t in inputs else "|" for t in document.token_L.tolist())


def documents(source, **data):
    made = loader(source, **data)
    (opened,) = made.sources
    return {words(opened.document(position)) for position in range(len(opened))}


def test_captioned_images_as_img2dataset_writes_them_are_filtered_by_their_metadata(tmp_path):
    def laion(number):
        meta = {"similarity": number / 10, "NSFW": "UNLIKELY" if number % 2 else "NSFW", "caption": f"json {number}"}
        return {"jpg": png(number), "txt": b"text", "json": json.dumps(meta).encode()}

    shard = write_tar(tmp_path / "00000.tar", [(f"{i:09d}", laion(i)) for i in range(10)])
    source = SourceConfig(
        shards=shard,
        prompts=("?",),
        name="laion",
        fields={"text": ("json:caption", "txt")},
        filters=("similarity >= 0.4", "NSFW in UNLIKELY, UNSURE"),
    )
    made = loader(source, max_bad_share=0.0)
    text = {
        "".join(chr(t) for t in row.token_T.tolist() if LAYOUT.is_text(t))
        for _ in range(300)
        for row in made.next().values()
    }
    assert {part for row in text for part in row.split("?") if part} == {"json 5", "json 7", "json 9"}
    assert set(made.skipped) == {("laion", "filtered:similarity"), ("laion", "filtered:NSFW")}


def test_a_filter_that_nothing_passes_is_told(tmp_path):
    shard = write_tar(tmp_path / "x.tar", [("a", {"txt": b"a", "json": b'{"score": 1}'})])
    with pytest.raises(ValueError, match=r"no sample of .*x\.tar' can be used for text \(filtered:score: 1\)"):
        loader(SourceConfig(shards=shard, task="text", filters=("score > 1",)))


def test_text_comes_from_json_lines_and_parquet(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two", "n": 3}\n')
    pq.write_table(pa.table({"body": ["three", "four", "five"]}), tmp_path / "b.parquet", row_group_size=1)
    assert documents(SourceConfig(shards=f"{tmp_path}/a.jsonl", task="text")) == {"|one|", "|two|"}
    columns = {"text": ("body",)}
    source = SourceConfig(shards=f"{tmp_path}/*.parquet", task="text", fields=columns)
    assert documents(source) == {"|three|", "|four|", "|five|"}


def test_a_parquet_table_of_the_hub_holds_images_and_captions(tmp_path):
    images = [{"bytes": png(i), "path": f"{i}.png"} for i in range(3)]
    pq.write_table(pa.table({"image": images, "caption": ["a", "b", "c"], "score": [1, 2, 3]}), tmp_path / "c.parquet")
    source = SourceConfig(shards=f"{tmp_path}/c.parquet", prompts=("?",), filters=("score >= 2",))
    made = loader(source)
    found = {row.token_T.numpy().tobytes() for _ in range(20) for row in made.next().values()}
    assert len(found) > 1
    assert set(made.skipped) == {("caption:c.parquet", "filtered:score")}


def test_documents_and_conversations_name_files_in_the_folder_of_their_shard(tmp_path):
    (tmp_path / "media").mkdir()
    (tmp_path / "media" / "0.png").write_bytes(png())
    (tmp_path / "media" / "1.wav").write_bytes(wav())
    mmc4 = {"text_list": ["a", "b"], "image_info": [{"image_name": "media/0.png", "matched_text_index": 1}]}
    (tmp_path / "d.jsonl").write_text(json.dumps(mmc4) + "\n")
    assert documents(SourceConfig(shards=f"{tmp_path}/d.jsonl", task="interleave")) == {"|a####b|"}
    question = [{"type": "audio", "audio": "media/1.wav"}, {"type": "text", "text": "what?"}]
    said = [("user", question), ("assistant", "hm"), ("user", "so?"), ("assistant", "yes")]
    chat = {"messages": [{"role": role, "content": content} for role, content in said]}
    (tmp_path / "c.jsonl").write_text(json.dumps(chat) + "\n")
    assert documents(SourceConfig(shards=f"{tmp_path}/c.jsonl", task="chat")) == {"||###what?|hm||so?|yes|"}
    outside = {"items": [{"image": "../x.png"}, {"text": "a"}]}
    (tmp_path / "o.jsonl").write_text(json.dumps(outside) + "\n")
    with pytest.raises(ValueError, match=r"can be used for interleave \(unsafe_name: 1\)"):
        loader(SourceConfig(shards=f"{tmp_path}/o.jsonl", task="interleave"))


def test_a_source_that_is_used_up_drops_out_and_the_others_go_on(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text("".join(f'{{"text": "{name}{i}"}}\n' for i in range(10)))
    sources = [SourceConfig(shards=f"{tmp_path}/{n}.jsonl", task="text", name=n, epochs=2 * (n == "a")) for n in "ab"]
    made = loader(*sources)
    rows = [row for _ in range(20) for row in made.next().values()]
    counts = [sum(key.startswith(f"{name}/") for row in rows for key in row.samples) for name in "ab"]
    assert counts[0] == 20
    assert counts[1] > 100
    assert not any(key.startswith("a/") for row in rows[-10:] for key in row.samples)
    once = loader(SourceConfig(shards=f"{tmp_path}/a.jsonl", task="text", name="a", epochs=1))
    seen = []
    with pytest.raises(ValueError, match="every data source is used up after"):
        while True:
            seen += [key for row in once.next().values() for key in row.samples]
    assert sorted(seen) == [f"a/a/{i}" for i in range(10)]


def test_a_missing_field_is_told_with_what_the_sample_has(tmp_path):
    def told(path, task, **source):
        with pytest.raises(ValueError, match="can be used") as error:
            loader(SourceConfig(shards=str(path), task=task, **source))
        return str(error.value).partition("the last one: ")[2].partition(" has no ")[2]

    tar = write_tar(tmp_path / "x.tar", [("02342 Track 2", {"0 (clean).wav": wav(), "txt": b"a"})])
    names = "member or column wav or flac or mp3 or ogg or opus or audio"
    dots = "(a sample's key ends at the first dot of the file's name)"
    assert told(tar, "transcribe") == f"{names}; it has 0 (clean).wav, txt {dots}"
    tar = write_tar(tmp_path / "y.tar", [("a", {"txt": b"a"})])
    assert told(tar, "transcribe") == f"{names}; it has txt"
    (tmp_path / "x.jsonl").write_text('{"sound": "a.wav", "text": "a"}\n')
    assert told(tmp_path / "x.jsonl", "transcribe") == f"{names}; it has sound, text"
    pq.write_table(pa.table({"text": ["a"], "sound": [b"a"]}), tmp_path / "x.parquet")
    assert told(tmp_path / "x.parquet", "transcribe") == f"{names}; it has text, sound"
