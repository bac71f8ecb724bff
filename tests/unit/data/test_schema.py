"""A few lines of YAML say where a sample's fields are and which samples are wanted."""

import json

import pytest

from megatron_gemini.config.data import SourceConfig
from megatron_gemini.config.load import config_from_dict
from megatron_gemini.data.sources.schema import Condition, Schema
from megatron_gemini.modalities.bad_sample import FilteredSample

# As img2dataset writes them for LAION-400M.
META = {"similarity": 0.34, "NSFW": "UNLIKELY", "pwatermark": "0.2", "width": 640, "sha256": "ab", "caption": "a cat"}


@pytest.mark.parametrize(
    ("condition", "passes"),
    [
        ("similarity >= 0.3", True),
        ("similarity>0.34", False),
        ("NSFW == UNLIKELY", True),
        ("NSFW in UNLIKELY, UNSURE", True),
        ("NSFW not in UNLIKELY, UNSURE", False),
        ("NSFW != NSFW", True),
        ("pwatermark <= 0.8", True),
        ("width < 640", False),
        ("width == 640.0", True),
        ("absent <= 3", False),
        ("absent != 3", False),
        ("NSFW >= 0", False),
        ("sha256 == 'ab'", True),
    ],
)
def test_a_filter_reads_as_it_says(condition, passes):
    assert Condition.parse(condition).holds(META) is passes
    schema = Schema.of(SourceConfig(shards="x", filters=("width >= 1", condition)))
    members = {"json": json.dumps(META).encode()}
    if passes:
        schema.check(members)
    else:
        with pytest.raises(FilteredSample) as error:
            schema.check(members)
        assert error.value.reason == f"filtered:{condition.split('>')[0].split()[0]}"


@pytest.mark.parametrize("text", ["", "similarity", "similarity >= high", ">= 3", "__import__('os')"])
def test_what_is_no_condition_is_refused(text):
    with pytest.raises(ValueError, match="the filter"):
        Condition.parse(text)


def test_a_key_of_a_json_member_is_a_field():
    fields = {"text": ("json:caption", "txt"), "image": ("photo.jpg",)}
    schema = Schema.of(SourceConfig(shards="x", fields=fields))
    assert schema.members() == ["photo.jpg", "json", "txt"]
    members = {"json": json.dumps(META).encode(), "txt": b"other"}
    assert schema.find("text", members) == [("json:caption", b"a cat"), ("txt", b"other")]
    assert schema.find("text", {"json": b"{}", "txt": b"other"}) == [("txt", b"other")]


def test_an_unknown_field_is_told_with_the_nearest_one():
    values = {"data": {"sources": [{"shards": "x", "fields": {"txt": ["a"]}}]}}
    expected = r"sources\.0.*fields\.txt is no field of the task caption; did you mean text\?"
    with pytest.raises(ValueError, match=expected):
        config_from_dict(values)
