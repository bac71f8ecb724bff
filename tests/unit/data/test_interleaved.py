"""The layouts in which people write interleaved documents and conversations are read as one ordered list."""

import pytest

from megatron_gemini.data.tasks.conversations import conversation
from megatron_gemini.data.tasks.descriptions import document_entries
from megatron_gemini.modalities.bad_sample import BadSample

EXPECTED = [("image", "0.png"), ("text", "a"), ("text", "b"), ("image", "1.png")]


def test_the_layouts_of_documents_say_the_same():
    own = [{"image": "0.png"}, {"text": "a"}, {"text": "b"}, {"image": "1.png"}]
    obelics = {"texts": [None, "a", "b", None], "images": ["0.png", None, None, "1.png"]}
    assert document_entries({"items": own}) == document_entries(own) == document_entries(obelics) == EXPECTED


def test_what_pandas_writes_for_a_missing_image_is_no_image_beside_a_text():
    missing = float("nan")
    obelics = {"texts": [missing, "a", "b", None], "images": ["0.png", missing, None, "1.png"]}
    assert document_entries(obelics) == EXPECTED
    assert document_entries({"text_list": ["a"], "image_info": [], "images": missing}) == [("text", "a")]


def test_an_image_of_mmc4_stands_before_its_sentence():
    images = [{"image_name": "1.png", "matched_text_index": 1}, {"image_name": "0.png", "matched_text_index": 0}]
    entries = document_entries({"text_list": ["a", "b"], "image_info": images, "url": "http://x"})
    assert entries == [("image", "0.png"), ("text", "a"), ("image", "1.png"), ("text", "b")]


def test_the_layouts_of_conversations_say_the_same():
    parts = [{"type": "image", "image": "0.png"}, {"type": "text", "text": "this?"}]
    said = [("system", "be brief"), ("user", parts), ("assistant", "a cat"), ("user", "more")]
    openai = {"messages": [{"role": role, "content": content} for role, content in said]}
    share = {"conversations": [{"from": {"assistant": "gpt"}.get(r, r), "value": c} for r, c in said]}
    turns = conversation(openai)
    assert turns == conversation(share) == conversation(openai["messages"])
    assert turns == [
        (False, [("text", "be brief"), ("text", "\n"), ("image", "0.png"), ("text", "this?")]),
        (True, [("text", "a cat")]),
    ]


@pytest.mark.parametrize(
    "description",
    [
        None,
        {"texts": ["a"], "images": []},
        {"texts": ["a"], "images": ["b"], "items": 3} | {"texts": [3]},
        {"text_list": ["a"], "image_info": [{"image_name": "x", "matched_text_index": 1}]},
        {"text_list": ["a"], "image_info": [{"image_name": "x"}]},
        {"text_list": ["a"], "image_info": [None]},
        {"text_list": [], "image_info": []},
        {"texts": ["a", "b"], "images": ["0.png", None]},
        {"text_list": ["a"], "images": ["0.png"], "image_info": []},
        {"items": [{"sound": "a"}]},
    ],
)
def test_a_document_that_is_none_is_a_bad_sample(description):
    with pytest.raises(BadSample) as error:
        document_entries(description)
    assert error.value.reason == "bad_json"


@pytest.mark.parametrize(
    ("description", "reason"),
    [
        ({"messages": "hello"}, "bad_json"),
        ({"messages": [{"role": "user", "content": "a"}]}, "no_answer"),
        ({"messages": []}, "no_answer"),
        ({"messages": [3]}, "bad_json"),
        ({"messages": [{"role": "root", "content": "a"}]}, "bad_json"),
        ({"messages": [{"role": ["user"], "content": "a"}]}, "bad_json"),
        ({"messages": [{"role": "user", "content": {"text": "a"}}]}, "bad_json"),
        ({"messages": [{"role": "user", "content": [{"type": "file", "file": "a"}]}]}, "bad_json"),
        ({"messages": [{"role": "user", "content": [{"type": ["text"], "text": "a"}]}]}, "bad_json"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "bad_json"),
    ],
)
def test_a_conversation_that_is_none_is_a_bad_sample(description, reason):
    with pytest.raises(BadSample) as error:
        conversation(description)
    assert error.value.reason == reason
