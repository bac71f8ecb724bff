"""Mutated bytes and JSON of every task: a sample gives a document or a BadSample, and nothing else comes of it."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_gemini.config.data import SourceConfig
from megatron_gemini.contracts import TokenLayout
from megatron_gemini.data.loading.source import Cache, DocumentSource
from megatron_gemini.data.random_stream import random_stream
from megatron_gemini.data.sources.columns import column_bytes
from megatron_gemini.modalities.bad_sample import BadSample
from megatron_gemini.modalities.text.tokenizer import TextTokenizer
from megatron_gemini.registry import TASKS
from tests.tiny_checkpoint import train_text_model
from tests.tiny_shards import chat, document, run_config, sample, write_tar

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(alphabet=st.characters(categories=["L", "N", "P", "Cs", "Cc"]), max_size=8)
    | st.sampled_from(["<image>", "0.png", "\ud83d", "data:;base64,AA==", "user", "assistant", "NaN"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["text", "image", "images", "audio", "type", "role", "content", "codes", "bytes", "path"]),
            inner,
            max_size=3,
        )
    ),
    max_leaves=6,
)


def beside(number):
    """A conversation of parts, with a further picture beside it."""
    members = chat(number)
    record = json.loads(members["json"])
    record["messages"][2]["content"].append({"type": "text", "text": "<image> and this?"})
    return {**members, "json": json.dumps({**record, "images": ["0.png"]}).encode()}


class Prepared:
    """A source of one task, whose members are given in place of what its shard holds."""

    def __init__(self, folder, task, tokenizer):
        self.members = {"interleave": document, "chat": beside}.get(task, sample)(1)
        self.layout = TokenLayout(tokenizer.size, (("image", 16),))
        shard = write_tar(folder / f"{task}.tar", [("s", self.members)])
        self.source = DocumentSource(
            SourceConfig(shards=shard, task=task), task, run_config([]), self.layout, tokenizer, Cache(0), 0.0
        )
        self.document()

    def document(self):
        return self.source.pipeline.document(self.source.sample(0), random_stream(0))

    def try_with(self, members, monkeypatch):
        """The document of other members, or None for a bad sample."""
        monkeypatch.setattr(
            self.source.shards, "read", lambda number, names: {n: members[n] for n in names if n in members}
        )
        try:
            made = self.document()
        except BadSample as error:
            assert error.reason.isascii() and len(str(error)) < 1000
            # The wall is the last resort: what a record alone can say has a reason of its own.
            assert not error.reason.endswith("_failed"), str(error)
            return None
        finally:
            monkeypatch.undo()
        assert ((made.token_L >= 0) & (made.token_L < self.layout.size)).all()
        return made


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    train_text_model(folder / "text.model")
    tokenizer = TextTokenizer(folder / "text.model")
    return {task: Prepared(folder, task, tokenizer) for task in TASKS}


def mutated(draw, data):
    """Some bytes overwritten, cut out, doubled or put in."""
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, len(data)))
        length = draw(st.integers(0, 16))
        piece = draw(st.binary(max_size=8) | st.just(data[place : place + length] * 2))
        data = data[:place] + piece + data[place + length :]
    return data


def replaced(draw, value):
    """JSON with one value somewhere in it replaced, or a key removed."""
    if isinstance(value, (dict, list)) and value and draw(st.integers(0, 3)):
        keys = list(value) if isinstance(value, dict) else range(len(value))
        place = draw(st.sampled_from(list(keys)))
        copy = value.copy()
        if draw(st.integers(0, 4)):
            copy[place] = replaced(draw, value[place])
        else:
            del copy[place]
        return copy
    return draw(JSON)


@pytest.mark.parametrize("task", list(TASKS))
def test_no_mutation_of_bytes_raises_anything_but_a_bad_sample(task, tasks, monkeypatch):
    good, bad = [], []

    @settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def check(data):
        members = dict(tasks[task].members)
        name = data.draw(st.sampled_from(sorted(set(members) & set(tasks[task].source.names)) or sorted(members)))
        members[name] = mutated(data.draw, members[name])
        (bad if tasks[task].try_with(members, monkeypatch) is None else good).append(name)

    check()
    assert bad


@pytest.mark.parametrize("task", list(TASKS))
def test_no_mutation_of_json_raises_anything_but_a_bad_sample(task, tasks, monkeypatch):
    source = tasks[task].source
    described = {field.name for field in source.schema.task.own_fields}
    found = []

    @settings(max_examples=500 if described else 100, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def check(data):
        members = dict(tasks[task].members)
        if described:
            members["json"] = json.dumps(replaced(data.draw, json.loads(members["json"]))).encode()
        else:  # as a table has it: a column holds whatever JSON can say
            name = data.draw(st.sampled_from(sorted(set(members) & set(source.names))))
            members[name] = column_bytes(data.draw(JSON)) or b""
        found.append(tasks[task].try_with(members, monkeypatch))

    check()
    assert None in found
