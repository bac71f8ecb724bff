"""Media that a record names beside its conversation stand where its marks are, whatever layout the record has."""

import base64
import json
import logging

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_gemini.config.data import SourceConfig
from megatron_gemini.data.loading.loader import Loader
from megatron_gemini.data.loading.source import Cache, DocumentSource
from megatron_gemini.data.random_stream import random_stream
from megatron_gemini.data.tasks.conversations import conversation
from megatron_gemini.modalities.bad_sample import BadSample
from megatron_gemini.registry import MODALITIES
from tests.tiny_shards import FORM, LAYOUT, Characters, mp4, png, run_config, wav, write_tar

FILES = {"image": ("a.png", png()), "video": ("a.mp4", mp4()), "audio": ("a.wav", wav())}
PLACED = {"image": "####", "video": "########", "audio": "###"}
MEDIA = list(FILES)


def source_of(path, **source):
    given = SourceConfig(**{"shards": str(path), "task": "chat", "name": "s", **source})
    return DocumentSource(given, "s", run_config([], row_tokens=256), LAYOUT, Characters(), Cache(0), 0.0)


def words(document):
    """Text as it is, placeholders as #, other control tokens as |."""
    inputs = {LAYOUT.control(name) for name in MEDIA}
    return "".join(chr(t) if LAYOUT.is_text(t) else "#" if t in inputs else "|" for t in document.token_L.tolist())


def document(source, number=0):
    return words(source.pipeline.document(source.sample(number), random_stream(0)))


def lines(folder, *records):
    for name, data in FILES.values():
        (folder / name).write_bytes(data)
    (folder / "x.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return source_of(folder / "x.jsonl")


def llava(text, answer="yes", **fields):
    return {"conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": answer}], **fields}


def messages(*contents, **fields):
    roles = ("user", "assistant")
    said = [{"role": roles[place % 2], "content": content} for place, content in enumerate(contents)]
    return {"messages": said, **fields}


def data_url(kind):
    return f"data:{kind}/x;base64,{base64.b64encode(FILES[kind][1]).decode()}"


@pytest.mark.parametrize("kind", MEDIA)
@pytest.mark.parametrize("field", ["one", "several"])
@pytest.mark.parametrize("how", ["path", "list", "mapping", "url", "bytes"])
def test_a_field_beside_a_conversation_is_placed_at_its_mark(tmp_path, kind, field, how):
    name = FILES[kind][0]
    value = {
        "path": name,
        "list": [name],
        "mapping": [{"bytes": None, "path": name}],
        "url": [data_url(kind)],
        "bytes": {"bytes": base64.b64encode(FILES[kind][1]).decode(), "path": None},
    }[how]
    fields = {MODALITIES.get(kind).beside[field == "several"]: value}
    source = lines(tmp_path, llava(f"<{kind}>\nwhat?", **fields), messages(f"what?\n<{kind}>", "yes", **fields))
    assert document(source, 0) == f"||{PLACED[kind]}what?|yes|"
    assert document(source, 1) == f"||what?{PLACED[kind]}|yes|"


@pytest.mark.parametrize("kind", MEDIA)
def test_without_a_mark_an_item_stands_before_the_first_question(tmp_path, kind):
    record = messages("what?", "yes", "more?", "no", **{kind: FILES[kind][0]})
    record["messages"].insert(0, {"role": "system", "content": "be brief"})
    assert document(lines(tmp_path, record)) == f"||be brief\n{PLACED[kind]}what?|yes||more?|no|"


def test_marks_in_every_turn_take_the_items_in_order(tmp_path):
    record = messages("<image>a<image>", "see <image>", "<audio>b", "c", images=["a.png"] * 3, audio="a.wav")
    record["messages"].insert(0, {"role": "system", "content": "with <video>"})
    record["videos"] = ["a.mp4"]
    expected = "||with ########\n####a####|see ####||###b|c|"
    assert document(lines(tmp_path, record)) == expected


def test_parts_without_a_name_take_the_items_beside_the_conversation(tmp_path):
    parts = [{"type": "image", "text": None}, {"type": "text", "text": "this?"}]
    assert document(lines(tmp_path, messages(parts, "yes", images=["a.png"]))) == "||####this?|yes|"


def test_parts_as_openai_writes_them(tmp_path):
    sound = {"data": base64.b64encode(FILES["audio"][1]).decode(), "format": "wav"}
    parts = [
        {"type": "image_url", "image_url": {"url": data_url("image"), "detail": "low"}},
        {"type": "image_url", "image_url": "a.png"},
        {"type": "image", "url": "a.png"},
        {"type": "image", "source": {"type": "base64", "data": base64.b64encode(FILES["image"][1]).decode()}},
        {"type": "input_audio", "input_audio": sound},
        {"type": "text", "text": "?"},
    ]
    assert document(lines(tmp_path, messages(parts, "yes"))) == f"||{'#' * 16}###?|yes|"


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (llava("<image>\nwhat?"), "mark_without_item"),
        (llava("<image><image>what?", image="a.png"), "mark_without_item"),
        (llava("what?", "a <video> tag"), "mark_without_item"),
        (llava("<image>what?", images=["a.png", "a.png"]), "item_without_mark"),
        ({"messages": [{"role": "assistant", "content": "a"}], "image": "a.png"}, "item_without_mark"),
        (messages([{"type": "audio"}], "a"), "mark_without_item"),
        (llava("<image>what?", image="a.png", images=["b.png"]), "bad_json"),
        (llava("<image>what?", image=3), "bad_json"),
        (llava("<image>what?", image={"bytes": None, "path": None}), "bad_json"),
        (llava("<image>what?", image="b.png"), "missing_image"),
        (llava("<image>what?", image="../a.png"), "unsafe_name"),
        (llava("<image>what?", image="/etc/passwd"), "unsafe_name"),
        (llava("<image>what?", image="file:///etc/passwd"), "unsafe_name"),
        (llava("<image>what?", image="https://host/a.png"), "remote_media"),
        (llava("<image>what?", image="data:image/png;base64,?"), "bad_data_url"),
        (llava("<image>what?", image="data:image/png;base64"), "bad_data_url"),
        (llava("<image>what?", image="data:image/png;base64,AAAA"), "image_unreadable"),
    ],
)
def test_what_does_not_belong_together_is_a_bad_sample(tmp_path, record, reason):
    with pytest.raises(BadSample) as error:
        document(lines(tmp_path, record))
    assert error.value.reason == reason


def test_an_empty_field_beside_a_conversation_is_no_item():
    for nothing in (None, "", [], float("nan")):
        assert conversation(llava("what?", image=nothing))[0].entries == [("text", "what?")]


def test_parquet_holds_conversations_with_bytes_beside_them(tmp_path):
    image, sound = {"bytes": FILES["image"][1], "path": "x.png"}, FILES["audio"][1]
    said = messages("<image>a<image><audio>", "yes")["messages"]
    parts = [{"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "b"}]}]
    parts.append({"role": "assistant", "content": [{"type": "text", "text": "no"}]})
    pq.write_table(pa.table({"messages": [said], "images": [[image, image]], "audio": [sound]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"messages": [parts], "image": [image]}), tmp_path / "b.parquet")
    assert document(source_of(tmp_path / "a.parquet")) == "||####a#######|yes|"
    assert document(source_of(tmp_path / "b.parquet")) == "||####b|no|"


def test_a_record_in_a_tar_names_its_own_member_by_the_path_it_had(tmp_path):
    record = json.dumps(llava("<image>what?", image="coco/train/0001.png")).encode()
    source = source_of(write_tar(tmp_path / "x.tar", [("d/0001", {"json": record, "png": png()})]))
    assert document(source) == "||####what?|yes|"


def test_a_field_that_nothing_reads_is_told_once_a_source(tmp_path, caplog):
    records = [
        llava("what?", pictures=["a.png"], id=3, score=0.5, places=[[1, 2]]),
        llava("<image>?", image="a.png", id=4),
    ] * 20
    lines(tmp_path, *records)
    source = SourceConfig(shards=str(tmp_path / "x.jsonl"), task="chat", name="mine", filters=("id >= 0",))
    with caplog.at_level(logging.WARNING):
        Loader(run_config([source], lanes=1, row_tokens=128), 0, 1, LAYOUT, Characters(), FORM).next()
    told = [record.message for record in caplog.records if "nothing reads" in record.message]
    assert told == ["mine: nothing reads the fields pictures of its records"]


@pytest.mark.parametrize("fields", [{"images": ["a.png"]}, {"image": "a.png"}])
@pytest.mark.parametrize("text", ["what?", "<image>what?"])
def test_a_field_of_a_message_is_placed_in_it(tmp_path, fields, text):
    (tmp_path / "a.png").write_bytes(png())
    said = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]
    asked = {"role": "user", "content": text, **fields}
    lines(tmp_path, {"messages": [*said, asked, {"role": "assistant", "content": "red"}]})
    made = document(source_of(tmp_path / "x.jsonl"))
    assert made.startswith("||hello|hi|") and made.endswith("what?|red|") and made.count("#") == 4


def test_an_item_that_a_part_and_a_field_name_is_a_bad_sample(tmp_path):
    parts = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "what?"}]
    said = [{"role": "user", "content": parts}, {"role": "assistant", "content": "red"}]
    lines(tmp_path, {"messages": said, "images": ["a.png"]})
    (tmp_path / "a.png").write_bytes(png())
    with pytest.raises(BadSample, match="the messages name items of image, and so do image, images beside them"):
        document(source_of(tmp_path / "x.jsonl"))
