"""What a column of a table holds beside plain text and bytes: lists, mappings, numbers, nothing, and names of files."""

import base64
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_gemini.config.data import SourceConfig
from megatron_gemini.data.loading.source import Cache, DocumentSource
from megatron_gemini.data.random_stream import random_stream
from megatron_gemini.data.samples.decode import CAPTIONS
from megatron_gemini.data.sources.columns import column_bytes, named_cell, named_column
from megatron_gemini.modalities.bad_sample import BadSample
from megatron_gemini.registry import TASKS
from tests.tiny_shards import LAYOUT, Characters, codes, mp4, png, run_config, wav, write_tar

NAN = float("nan")
MEDIA = {"image": ("a.png", png()), "audio": ("a.wav", wav()), "video": ("a.mp4", mp4())}
READS_TEXT = [name for name in TASKS if "text" in TASKS.get(name).field_names]


def source_of(path, task, **source):
    given = SourceConfig(**{"shards": str(path), "task": task, "prompts": (), **source})
    return DocumentSource(given, "s", run_config([], row_tokens=256), LAYOUT, Characters(), Cache(0), 0.0)


def text_tokens(source, number=0, seed=0):
    tokens = source.pipeline.document(source.sample(number), random_stream(seed)).token_L.tolist()
    return "".join(chr(token) if LAYOUT.is_text(token) else "|" for token in tokens)


def table(folder, form, record, task="text"):
    """A source of one record, with the media that its task needs beside the text."""
    for field in TASKS.get(task).field_names:
        if field in MEDIA:
            (folder / MEDIA[field][0]).write_bytes(MEDIA[field][1])
            record = {**record, field: MEDIA[field][0]}
        if field == "codes":
            record = {**record, field: json.loads(codes(0))}
    path = folder / f"x.{form}"
    if form == "jsonl":
        path.write_text(json.dumps(record) + "\n")
    else:
        pq.write_table(pa.table({name: [value] for name, value in record.items()}), path)
    return path


@pytest.mark.parametrize("task", READS_TEXT)
@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_a_list_of_captions_is_several_texts_in_every_task(tmp_path, task, form):
    source = source_of(table(tmp_path, form, {"text": ["red", None, "", "blue thing", "x"]}, task), task)
    assert source.sample(0).fields[CAPTIONS] == ["red", "blue thing", "x"]
    tokens = text_tokens(source)
    assert "red" in tokens
    assert not set('[]",') & set(tokens)


def test_choose_caption_chooses_among_the_captions_of_a_list(tmp_path):
    operations = ("decode", "choose_caption", "format", "tokenize")
    path = table(tmp_path, "jsonl", {"text": ["a", "b", "c"]})
    found = {text_tokens(source_of(path, "text", operations=operations), seed=seed) for seed in range(30)}
    assert found == {"|a|", "|b|", "|c|"}


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
@pytest.mark.parametrize(
    ("value", "text"),
    [(7, "7"), (3.0, "3"), (2.5, "2.5"), (["x", 4], "x"), ("\ufeffabc", "abc"), ('["a"]', '["a"]'), ("5", "5")],
)
def test_a_column_s_text_is_what_a_reader_would_say(tmp_path, form, value, text):
    if form == "parquet" and isinstance(value, list):
        value = value[:1]
    assert text_tokens(source_of(table(tmp_path, form, {"text": value}), "text")) == f"|{text}|"


@pytest.mark.parametrize("task", READS_TEXT)
@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (NAN, "missing_text"),
        (None, "missing_text"),
        ([], "missing_text"),
        ([None, NAN], "missing_text"),
        (["", " "], "empty_text"),
        ({"en": "a", "de": "b"}, "text_by_key"),
        ([{"raw": "a"}], "text_by_key"),
        (True, "bad_text"),
        ([["a"]], "bad_text"),
        ("\ud83d", "bad_text"),
        (["\ud83d"], "bad_text"),
    ],
)
def test_what_is_missing_or_no_text_is_a_bad_sample_in_every_task(tmp_path, task, value, reason):
    with pytest.raises(BadSample) as error:
        source_of(table(tmp_path, "jsonl", {"text": value}, task), task).sample(0)
    assert error.value.reason == reason


def test_missing_values_of_pandas_are_missing_in_parquet_too(tmp_path):
    columns = {"text": pa.array([NAN], pa.float64()), "caption": ["the next name"]}
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    assert text_tokens(source_of(tmp_path / "x.parquet", "text")) == "|the next name|"


def test_a_mapping_of_captions_is_read_by_a_key_of_the_settings(tmp_path):
    record = {"caption": {"en": ["a", "b"], "de": "c"}, "sentences": [{"raw": "d"}, {"raw": "e"}]}
    path = table(tmp_path, "jsonl", record)
    fields = {"text": ("caption:en", "caption:de", "sentences:raw")}
    found = source_of(path, "text", fields=fields).sample(0).fields
    assert found[CAPTIONS] == ["a", "b", "c", "d", "e"]
    with pytest.raises(BadSample, match=r"caption has the keys en, de; choose one, as in fields: \{text: \[caption:en"):
        source_of(path, "text").sample(0)
    tar = write_tar(tmp_path / "x.tar", [("a", {"json": json.dumps(record).encode()})])
    assert text_tokens(source_of(tar, "text", fields={"text": ("json:caption:de",)})) == "|c|"


@pytest.mark.parametrize("task", ["caption", "transcribe", "video_caption"])
@pytest.mark.parametrize("form", ["jsonl", "parquet"])
@pytest.mark.parametrize("how", ["path", "mapping", "url", "list"])
def test_a_column_of_media_may_name_a_file(tmp_path, task, form, how):
    field = TASKS.get(task).field_names[0]
    name, data = MEDIA[field]
    url = f"data:x/y;base64,{base64.b64encode(data).decode()}"
    value = {"path": f"m/{name}", "mapping": {"bytes": None, "path": f"m/{name}"}, "url": url, "list": [f"m/{name}"]}
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / name).write_bytes(data)
    path = table(tmp_path, form, {"text": "a"})
    record = {"text": "a", field: value[how]}
    if form == "jsonl":
        path.write_text(json.dumps(record) + "\n")
    else:
        pq.write_table(pa.table({name: [value] for name, value in record.items()}), path)
    assert text_tokens(source_of(path, task)).endswith("|a|")


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("b.png", "missing_image"),
        ("../a.png", "unsafe_name"),
        ("/etc/passwd", "unsafe_name"),
        ("https://host/a.png", "remote_media"),
        (["a.png", "b.png"], "several_items"),
        (NAN, "missing_image"),
        ({"bytes": None, "path": None}, "missing_image"),
        ({"path": 3}, "image_unreadable"),
        ({"url": 3}, "bad_json"),
        (3, "image_unreadable"),
    ],
)
def test_a_column_that_names_no_file_of_the_folder_is_a_bad_sample(tmp_path, value, reason):
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "x.jsonl").write_text(json.dumps({"text": "a", "image": value}) + "\n")
    with pytest.raises(BadSample) as error:
        source_of(tmp_path / "d" / "x.jsonl", "caption").sample(0)
    assert error.value.reason == reason


@pytest.mark.parametrize(
    "name", ["column:", "column:[]", "column:[1]", "column:{}", 'column:["a",{}]', "column:[[", "a"]
)
def test_a_name_that_a_stranger_wrote_is_no_column(name):
    assert named_column(name) is None


@pytest.mark.parametrize("place", [["a", 5], ["a", "b"], ["b"], ["a", -1], ["a", 0, 0]])
def test_a_place_that_a_record_does_not_have_is_nothing(place):
    assert named_cell({"a": [b"x"]}, place) is None
    assert column_bytes(named_cell({"a": [b"x"]}, ["a", 0])) == b"x"


@pytest.mark.parametrize("task", READS_TEXT)
def test_a_byte_order_mark_is_no_part_of_a_text_and_utf_16_is_refused_by_name(tmp_path, task):
    members = {"png": png(), "wav": wav(), "mp4": mp4(), "codes.json": codes(0)}
    texts = ["\ufeffabc".encode(), "abc".encode("utf-16"), "\ufeffabc".encode("utf-16-be")]
    tar = write_tar(tmp_path / "x.tar", [(f"s{i}", {**members, "txt": text}) for i, text in enumerate(texts)])
    assert source_of(tar, task).sample(0).fields["text"] == "abc"
    for number in (1, 2):
        with pytest.raises(BadSample, match="the text is UTF-16; write it as UTF-8") as error:
            source_of(tar, task).sample(number)
        assert error.value.reason == "bad_text"
