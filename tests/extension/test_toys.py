"""The toy task, format and metric do what docs/extending.md says of them, without a run."""

from __future__ import annotations

import json
import math

import pytest

from megatron_gemini.data.samples.items import Text
from megatron_gemini.data.samples.spec import Fields
from megatron_gemini.evaluation.metrics.inputs import Texts
from megatron_gemini.modalities.bad_sample import BadSample
from tests.extension.comma_separated import CSV
from tests.extension.first_word import FIRST_WORD
from tests.extension.naming import NAMING, SCORE
from tests.extension.series import Series, SeriesConfig, decode


@pytest.mark.parametrize(
    "bad", [b"", b"[", b"[]", b"7", b'["x"]', b"[NaN]", b"[[1]]", b"[1" + b"0" * 400 + b"]", b"\xff"]
)
def test_a_modality_refuses_what_is_no_series(bad):
    assert decode(b"[1, 2.5]", SeriesConfig()) == Series((1.0, 2.5))
    with pytest.raises(BadSample):
        decode(bad, SeriesConfig())


def test_a_task_makes_both_sides_and_a_column():
    series = Series((1.0, 2.0))
    example = NAMING.form(Fields(series=series, text="rising", score=0.5), "what is this?")
    assert example.prompt == [series, Text("what is this?")]
    assert example.answer == [Text("rising")]
    assert example.columns == {"score": 0.5}


@pytest.mark.parametrize("bad", [b"-1", b"true", b'"1"', b"[1]", b"NaN"])
def test_a_field_of_a_task_refuses_what_is_no_score(bad):
    assert SCORE.decode(b"2", lambda kind, name: Text(name)) == 2.0
    with pytest.raises(BadSample):
        SCORE.decode(bad, lambda kind, name: Text(name))


def test_a_format_gives_columns_by_number_over_all_files(tmp_path):
    first, second = tmp_path / "a.csv", tmp_path / "b.csv"
    first.write_text('series,text\n"[1, 2]",rising\n"[2, 1]",\n')
    second.write_text('series,text\n"[3]","one, alone"\n')
    records = CSV.open([str(first), str(second)], ["series", "text"], None)
    assert [records.key(number) for number in range(len(records))] == ["a/0", "a/1", "b/0"]
    assert records.read(1, ["series", "text"]) == {"series": b"[2, 1]"}
    assert records.read(2, ["text"]) == {"text": b"one, alone"}
    assert json.loads(records.read(0, ["json"])["json"]) == {"series": "[1, 2]", "text": "rising"}


def test_a_metric_is_a_share_of_answers():
    assert FIRST_WORD.score(Texts(["Seven of them", "a two", ""], ["seven.", "two", "one"])) == pytest.approx(1 / 3)
    assert math.isnan(FIRST_WORD.score(Texts([], [])))
