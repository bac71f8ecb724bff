"""Texts and labels of validation data come from where their source says that they are."""

import json
from collections import Counter

import pytest

from megatron_gemini.config.data import SourceConfig
from megatron_gemini.data.samples.decode import SampleDecoder
from megatron_gemini.evaluation.validation import read_examples, read_images
from tests.tiny_shards import png, run_config, sample, write_tar


def examples(source):
    skipped: Counter[str] = Counter()
    return read_examples(source, SampleDecoder(run_config([])), 99, 0, skipped), skipped


@pytest.mark.parametrize("task", ["caption", "speech_to_image"])
def test_a_source_s_fields_say_where_texts_and_labels_are(tmp_path, task):
    meta = json.dumps({"caption": {"en": "a cat"}, "other": 3}).encode()
    tar = write_tar(tmp_path / "x.tar", [("a", {**sample(0), "json": meta})])
    fields = {"text": ("json:caption:en",)}
    (found,), _ = examples(SourceConfig(shards=tar, task=task, fields=fields))
    assert (found.text, found.label) == ("a cat", "a cat")
    (found,), _ = examples(SourceConfig(shards=tar, task=task))
    assert (found.text, found.label) == ("number 0", "number 0")


def test_tables_have_texts_labels_and_images_under_their_own_names(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    rows = [{"photo": "a.png", "words": ["one", "two"]}, {"photo": "a.png", "words": "three", "label": 7}]
    rows.append({"photo": "b.png", "words": "four"})
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    fields = {"image": ("photo",), "text": ("words",)}
    source = SourceConfig(shards=f"{tmp_path}/x.jsonl", task="caption", fields=fields)
    found, skipped = examples(source)
    assert [(each.text, each.label) for each in found] == [("one", "one"), ("three", "7")]
    assert skipped == {"missing_image": 1}
    real = read_images([source], 8, 99)
    assert real.labels == ["one", "7"]


def test_a_text_that_the_task_does_not_read_costs_no_sample(tmp_path):
    tar = write_tar(tmp_path / "x.tar", [("a", {**sample(0), "txt": b"\xff"})])
    (found,), skipped = examples(SourceConfig(shards=tar, task="speech_to_image"))
    assert found.text == "" and not skipped
