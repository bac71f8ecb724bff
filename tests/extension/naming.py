"""A toy data task: the model sees a series, is asked for its name, and answers with the sample's text.

The sample's score, `x.score.json`, becomes a column of the document.
"""

from __future__ import annotations

from megatron_gemini.contracts import TEXT
from megatron_gemini.data.samples.decode_json import decode_json
from megatron_gemini.data.samples.items import Example, Text
from megatron_gemini.data.samples.spec import Fields, FieldSpec, ReadItem, TaskSpec
from megatron_gemini.modalities.bad_sample import BadSample


def read_score(data: bytes, read_item: ReadItem) -> float:
    """A number in JSON, 0 or more."""
    score = decode_json(data)
    if isinstance(score, bool) or not isinstance(score, (int, float)) or not score >= 0:
        raise BadSample("bad_score", f"a score is a number of 0 or more, not {str(score)[:20]}")
    return float(score)


def form(fields: Fields, words: str) -> Example:
    score = fields.plain(SCORE.name)
    assert isinstance(score, float)
    return Example([fields.item("series"), Text(words)], [Text(fields.text())], columns={"score": score})


SCORE = FieldSpec("score", members=("score.json", "score"), decode=read_score)
NAMING = TaskSpec(
    "name_series",
    fields=("series", TEXT, SCORE),
    form=form,
    prompts=("what is this?", "name the series."),
)
