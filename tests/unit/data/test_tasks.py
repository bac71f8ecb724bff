"""Samples become questions and answers, and bad ones one counted reason."""

import json

import numpy as np
import pytest

from megatron_gemini.config.data import SourceConfig
from megatron_gemini.config.run import RunConfig
from megatron_gemini.data.random_stream import random_stream
from megatron_gemini.data.samples.decode import SampleDecoder
from megatron_gemini.data.samples.form import check_prompts, form_example
from megatron_gemini.data.samples.items import Codes, EncoderInput, Text
from megatron_gemini.data.sources.schema import Schema
from megatron_gemini.modalities.bad_sample import BadSample
from megatron_gemini.registry import TASKS
from tests.tiny_shards import AUDIO, IMAGE_TOKENIZER, VISION, codes, document, png, sample, wav

DECODER = SampleDecoder(RunConfig(encoders={"vision": VISION, "audio": AUDIO}, image_tokenizer=IMAGE_TOKENIZER))


def question(task, seed=0, prompts=(), caption_dropout=0.0, members=None):
    members = members or (document(1) if task == "interleave" else sample(1))
    fields = DECODER.decode(members, "k", schema(task))
    return form_example(TASKS.get(task), fields, prompts, random_stream(seed), caption_dropout)


def schema(task):
    return Schema.of(SourceConfig(shards="x", task=task))


def kinds(items):
    return [item.placeholder if isinstance(item, EncoderInput) else type(item) for item in items]


@pytest.mark.parametrize(
    ("task", "prompt", "answer"),
    [
        ("caption", ["image", Text], [Text]),
        ("generate", [Text], [Codes]),
        ("transcribe", ["audio", Text], [Text]),
        ("speech_to_image", ["audio", Text], [Codes]),
        ("video_caption", ["video", Text], [Text]),
    ],
)
def test_each_task_asks_with_its_medium_and_is_answered_in_kind(task, prompt, answer):
    asked = question(task)
    assert kinds(asked.prompt) == prompt
    assert kinds(asked.answer) == answer
    if answer == [Text]:
        assert asked.answer == [Text("number 1")]
    else:
        assert list(asked.answer[0].codes) == json.loads(codes(1))["codes"]


def test_whole_documents_have_no_answer():
    asked = question("text")
    assert (asked.prompt, asked.answer) == ([Text("number 1")], None)
    asked = question("interleave")
    assert kinds(asked.prompt) == ["image", Text, Codes]
    assert asked.answer is None


def test_what_a_user_would_type_is_among_the_prompts():
    prompts = {task.name: task.prompts for task in TASKS.entries() if task.prompts}
    assert len(prompts) == 5
    seen = {task: {question(task, seed).prompt[-1].text for seed in range(60)} for task in prompts}
    assert "draw number 1" in seen["generate"]
    assert "what is this?" in seen["caption"]
    assert "what was said?" in seen["transcribe"]
    assert all(len(seen[task]) == len(choices) for task, choices in prompts.items())


def test_prompts_of_the_source_replace_the_tasks_own():
    assert question("generate", prompts=("please {text}!",)).prompt == [Text("please number 1!")]


def test_caption_dropout_empties_that_share_of_drawing_prompts_only():
    empty = [not question("generate", seed, caption_dropout=0.3).prompt for seed in range(300)]
    assert 0.2 < np.mean(empty) < 0.4
    assert question("speech_to_image", caption_dropout=1.0).prompt == []
    assert question("caption", caption_dropout=1.0).prompt


def test_random_streams_depend_on_the_key_alone():
    first = random_stream(0, "source", 3, "key").random(4)
    np.random.seed(1)
    assert (random_stream(0, "source", 3, "key").random(4) == first).all()
    assert len({random_stream(*key).random() for key in ((0, "a", 1), (0, "a", 2), (1, "a", 1), (0, "b", 1))}) == 4


def test_prompts_that_a_task_cannot_use_are_refused():
    check_prompts(TASKS.get("generate"), ["draw {text}"], "s")
    with pytest.raises(ValueError, match=r"'draw it' of the data source 's' has no \{text\}"):
        check_prompts(TASKS.get("generate"), ["draw it"], "s")
    with pytest.raises(ValueError, match="the task 'text' asks none"):
        check_prompts(TASKS.get("text"), ["read"], "s")


def test_only_the_members_that_a_task_needs_are_read():
    assert set(schema("caption").members()) & set(sample(0)) == {"png", "txt"}
    assert set(schema("interleave").members()) & set(document(0)) == {"json"}


@pytest.mark.parametrize(
    ("task", "members", "reason"),
    [
        ("caption", {"txt": b"a"}, "missing_image"),
        ("caption", {"png": png(), "txt": b" \n"}, "empty_text"),
        ("caption", {"png": png(), "txt": b"\xff\xfe"}, "bad_text"),
        ("caption", {"png": png()[:60], "txt": b"a"}, "image_corrupt"),
        ("transcribe", {"wav": wav()[:-100], "txt": b"a"}, "audio_truncated"),
        ("video_caption", {"mp4": b"nonsense", "txt": b"a"}, "video_unreadable"),
        ("generate", {"txt": b"a"}, "missing_codes"),
        ("generate", {"txt": b"a", "codes.json": b'{"codes": [1, 2]}'}, "bad_codes"),
        ("generate", {"txt": b"a", "codes.json": b'{"codes": [1, 2, 3, 16]}'}, "bad_codes"),
        ("generate", {"txt": b"a", "codes.json": b'{"codes": [1, 2, 3, true]}'}, "bad_codes"),
        ("generate", {"txt": b"a", "codes.json": b"[" * 200_000}, "bad_json"),
        ("interleave", {"png": png()}, "missing_items"),
        ("interleave", {"json": b"{"}, "bad_json"),
        ("interleave", {"json": b'{"items": []}'}, "bad_json"),
        ("interleave", {"json": b'{"items": [{"text": 3}]}'}, "bad_json"),
        ("interleave", {"json": b'{"items": [{"text": "a", "image": "b"}]}'}, "bad_json"),
        ("interleave", {"json": b'{"items": [{"image": "../../etc/passwd"}]}'}, "missing_image"),
    ],
)
def test_a_bad_sample_has_one_reason_and_is_named(task, members, reason):
    with pytest.raises(BadSample, match=r"^k") as error:
        DECODER.decode(members, "k", schema(task))
    assert error.value.reason == reason
