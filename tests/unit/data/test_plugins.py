"""What a plugin adds to data, a task, a field, a format and an operation, also works in worker processes."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest

from megatron_gemini import plugins
from megatron_gemini.config.data import SourceConfig
from megatron_gemini.config.load import config_from_dict
from megatron_gemini.contracts import Column, RowFormat
from megatron_gemini.data.loading.loader import Loader
from megatron_gemini.data.loading.worker import WorkerTask
from megatron_gemini.registry import FORMATS, OPERATIONS, TASKS
from tests.tiny_shards import LAYOUT, Characters, run_config, write_tar

PLUGIN = '''
"""One task, one file format and one operation, each as a plugin writes it."""

import dataclasses
from pathlib import Path

from megatron_gemini.data.operations.spec import OperationSpec
from megatron_gemini.data.samples.decode_json import decode_json
from megatron_gemini.data.samples.items import Example, Text
from megatron_gemini.data.samples.spec import Fields, FieldSpec, TaskSpec
from megatron_gemini.data.sources.spec import FormatSpec
from megatron_gemini.data.sources.table import Table
from megatron_gemini.registry import FORMATS, OPERATIONS, TASKS

RATING = FieldSpec("rating", members=("rating.json", "rating"), decode=lambda data, read_item: decode_json(data))


def form(fields, words):
    rating = fields.plain("rating")
    return Example([Text(words)], [Text(fields.text())], columns={"score": rating["score"], "emphasis": rating["each"]})


def shout(setting, marks=1):
    def apply(sample, random):
        text = sample.fields.text().upper() + "!" * marks
        return dataclasses.replace(sample, fields=Fields({**sample.fields, "text": text}))

    return apply


class Lines(Table):
    """Text files: a line is a text."""

    def __init__(self, paths):
        self.lines = [Path(path).read_bytes().splitlines() for path in paths]
        super().__init__(paths, list(map(len, self.lines)))

    def read(self, sample, names):
        file, number = self._find(sample)
        return {"text": self.lines[file][number]} if "text" in names else {}


TASKS.register("rated", TaskSpec("rated", fields=("text", RATING), form=form, prompts=("say",)))
OPERATIONS.register("shout", OperationSpec(shout))
FORMATS.register("lines", FormatSpec("lines", endings=(".lines",), open=lambda paths, names, cache: Lines(paths)))
'''
FORM = RowFormat((Column("score", "document", fill=-1.0), Column("emphasis", "target", "int32")))


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """The plugin, loaded as the command line does it, and gone afterwards."""
    (tmp_path / "rated_plugin.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(plugins, "_loaded", [])
    plugins.load(["rated_plugin"])
    yield "rated_plugin"
    for registry, name in ((TASKS, "rated"), (OPERATIONS, "shout"), (FORMATS, "lines")):
        registry.unregister(name)
    del sys.modules["rated_plugin"]


def rated(number):
    """Of the nine tokens `bos user say model NUMBER eos`, each its own emphasis."""
    rating = {"score": number / 2, "each": [10 * number + place for place in range(8)]}
    return {"txt": str(number).encode(), "rating.json": json.dumps(rating).encode()}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_plugin_s_task_fills_the_objective_s_columns_from_the_sample_in_any_process(plugin, tmp_path, workers):
    shard = write_tar(tmp_path / "x.tar", ((f"s{i}", rated(i)) for i in range(9)))
    config = run_config([SourceConfig(shards=shard, task="rated", name="r")], workers=workers, row_tokens=20)
    with Loader(config, 0, 1, LAYOUT, Characters(), FORM) as loader:
        rows = [row for _ in range(4) for row in loader.next().values()]
    assert {row.samples[0] for row in rows} > {rows[0].samples[0]}
    for row in rows:
        numbers = [int(key[-1]) for key in row.samples]
        assert row.columns["score"].tolist() == [number / 2 for number in numbers]
        targets = [10 * number + place for number in numbers for place in [*range(1, 8), -10 * number]]
        assert row.columns["emphasis"].tolist() == targets + [0] * (20 - len(targets))


def test_a_column_that_is_none_costs_its_sample_alone(plugin, tmp_path):
    bad = {**rated(3), "rating.json": b'{"score": "high", "each": 1}'}
    shard = write_tar(tmp_path / "x.tar", [("s1", rated(1)), ("s3", bad)])
    config = run_config([SourceConfig(shards=shard, task="rated", name="r")], row_tokens=20)
    with Loader(config, 0, 1, LAYOUT, Characters(), FORM) as loader:
        rows = [row for _ in range(4) for row in loader.next().values()]
        assert set(loader.skipped) == {("r", "bad_column")}
    assert {key for row in rows for key in row.samples} == {"r/s1"}


def test_a_plugin_s_format_and_operation_are_named_like_built_in_ones(plugin, tmp_path):
    (tmp_path / "a.lines").write_text("one\ntwo\n")
    operations = ("decode", "shout(marks=2)", "format", "tokenize")
    for kind in ("auto", "lines"):
        source = SourceConfig(shards=f"{tmp_path}/a.lines", task="text", format=kind, operations=operations)
        with Loader(run_config([source]), 0, 1, LAYOUT, Characters(), RowFormat()) as loader:
            text = Characters.decode(loader.next()[0].token_T.tolist())
        assert "ONE!!" in text and "TWO!!" in text
    with pytest.raises(ValueError, match=r"'shoutt' is no operation; did you mean shout\?"):
        shouting = dataclasses.replace(source, operations=("decode", "shoutt", "format", "tokenize"))
        Loader(run_config([shouting]), 0, 1, LAYOUT, Characters(), RowFormat())


def test_a_task_s_own_field_is_a_setting_of_its_sources_alone(plugin):
    source = {"shards": "x", "task": "rated", "fields": {"rating": ["json:rating"]}}
    made = config_from_dict({"data": {"sources": [source]}}).data.sources[0]
    assert made.fields == {"rating": ("json:rating",)}
    with pytest.raises(ValueError, match=r"fields\.rating is no field of the task caption"):
        config_from_dict({"data": {"sources": [{**source, "task": "caption"}]}})


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("task", "captoin", r"task is 'captoin'; did you mean caption\?"),
        ("format", "jsonll", r"format is 'jsonll'; did you mean jsonl\?"),
        (
            "fields",
            {"immage": ["x"]},
            r"fields\.immage is no field of the task caption; did you mean image\?",
        ),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(setting, value, message):
    with pytest.raises(ValueError, match=r"data\.sources\.0: data\.sources\." + message):
        config_from_dict({"data": {"sources": [{"shards": "x", setting: value}]}})


def test_a_worker_loads_plugins_in_their_order_before_it_unpacks_its_work(tmp_path, monkeypatch):
    names = ("plugin_of_order", "plugin_of_tokenizer")
    (tmp_path / f"{names[0]}.py").write_text("")
    (tmp_path / f"{names[1]}.py").write_text("class Tokenizer:\n    def encode(self, text):\n        return [1]\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(plugins, "_loaded", [])
    plugins.load(names)
    tokenizer = sys.modules[names[1]].Tokenizer()
    packed = WorkerTask(run_config([]), LAYOUT, tokenizer, FORM, [0], 0, 1, None, 0, plugins.loaded()).packed()
    for name in names:
        del sys.modules[name]
    monkeypatch.setattr(plugins, "_loaded", [])
    assert packed.unpack().tokenizer.encode("x") == [1]
    assert tuple(name for name in sys.modules if name in names) == names
    for name in names:
        del sys.modules[name]


def test_a_plugin_that_a_worker_cannot_load_is_told_in_the_rank(plugin, tmp_path):
    shard = write_tar(tmp_path / "x.tar", ((f"s{i}", rated(i)) for i in range(3)))
    config = run_config([SourceConfig(shards=shard, task="rated", name="r")], workers=1, row_tokens=20)
    with Loader(config, 0, 1, LAYOUT, Characters(), FORM) as loader:
        Path(tmp_path / "rated_plugin.py").unlink()
        with pytest.raises(ValueError, match="the plugin rated_plugin is not there"):
            loader.next()
