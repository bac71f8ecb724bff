"""An objective's columns say of every document what its task said, however rows are packed and wherever they travel."""

import json
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_gemini.contracts import Batch, Column, RowFormat
from megatron_gemini.data.packing.columns import check_columns
from megatron_gemini.data.packing.pack import pack
from megatron_gemini.data.packing.wire import from_bytes, parse_header, pinned, to_bytes
from megatron_gemini.data.samples.document import build_example
from megatron_gemini.data.samples.items import Example, Text
from megatron_gemini.engine.batch_exchange import _packet, _row
from megatron_gemini.modalities.bad_sample import BadSample
from tests.tiny_shards import AUDIO, LAYOUT, VISION, Characters

PER = ("token", "target", "document")
DTYPES = ("float32", "int64", "int32", "int8", "bool")


def document(length, columns=None, key="k"):
    """A document of so many tokens, of which three are its frame."""
    example = Example([Text("a" * (length - 2))], None, columns=columns or {})
    given = {"layout": LAYOUT, "text_tokenizer": Characters(), "encoders": {"vision": VISION, "audio": AUDIO}}
    made = build_example(example, key=key, **given)
    assert len(made) == length
    return made


def by_document(row: Batch, column: Column) -> list[list[float]]:
    """What a row says of each of its documents, without padding; of targets, all but the last, which has none."""
    values = row.columns[column.name]
    if column.per == "document":
        return [[value] for value in values.tolist()]
    segments = [row.segment_T == number for number in range(1, len(row.samples) + 1)]
    return [values[mine].tolist()[: -1 if column.per == "target" else None] for mine in segments]


@st.composite
def columns_and_documents(draw):
    dtypes = draw(st.lists(st.sampled_from(DTYPES), min_size=1, max_size=4))
    columns = tuple(
        Column(f"c{i}", draw(st.sampled_from(PER)), dtype, fill=float(draw(st.integers(0, 1))))
        for i, dtype in enumerate(dtypes)
    )
    documents = []
    for number in range(draw(st.integers(1, 5))):
        length = draw(st.integers(2, 6))
        values: dict[str, object] = {}
        for column in columns:
            numbers = st.integers(0, 1) if column.dtype == "bool" else st.integers(-100, 100)
            whole = st.lists(numbers, min_size=length, max_size=length)
            kind = draw(st.sampled_from(["absent", "one", *(["each"] if column.per != "document" else [])]))
            if kind != "absent":
                values[column.name] = draw(numbers if kind == "one" else whole)
        documents.append(document(length, values, f"k{number}"))
    return columns, documents


@settings(max_examples=60, deadline=None)
@given(columns_and_documents(), st.integers(0, 4))
def test_every_document_keeps_its_values_alone_and_together_in_any_order(made, padding):
    columns, documents = made
    form = RowFormat(columns)
    alone = [pack([each], len(each), form) for each in documents]
    for order in (documents, documents[::-1]):
        row = pack(order, sum(map(len, order)) + padding, form)
        for column in columns:
            values = row.columns[column.name]
            assert values.dtype == getattr(torch, column.dtype)
            assert values.shape == ((len(order),) if column.per == "document" else row.token_T.shape)
            found = dict(zip(row.samples, by_document(row, column), strict=True))
            assert found == {d.key: by_document(r, column)[0] for d, r in zip(documents, alone, strict=True)}
            expected = {d.key: wanted(d, column) for d in documents}
            assert found == expected
            if column.per != "document":
                last = (row.position_T == 0).roll(-1) & (row.segment_T > 0)
                unused = (row.segment_T == 0) | (last if column.per == "target" else row.segment_T == 0)
                assert (values[unused] == torch.tensor(column.fill).to(values.dtype)).all()


def wanted(made, column):
    """The plain definition: one number for all tokens or each its own, those of targets from the second on."""
    value = made.columns.get(column.name, column.fill)
    if column.per == "document":
        return [value]
    values = list(value) if isinstance(value, list) else [value] * len(made)
    return values[1:] if column.per == "target" else values


@settings(max_examples=40, deadline=None)
@given(columns_and_documents(), st.integers(0, 70))
def test_columns_survive_the_way_between_processes_and_between_ranks(made, padding):
    columns, documents = made
    row = pack(documents, sum(map(len, documents)) + padding, RowFormat(columns))
    header, body = to_bytes(row, {})
    torch_body = torch.frombuffer(body, dtype=torch.uint8)
    for again in (from_bytes(parse_header(header), torch_body), _row(torch.from_numpy(_packet(row).copy()))):
        assert again.columns.keys() == row.columns.keys()
        for name, column in row.columns.items():
            assert again.columns[name].dtype == column.dtype
            assert torch.equal(again.columns[name], column)
        assert torch.equal(again.token_T, row.token_T)


def test_pinned_rows_keep_their_columns(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)  # there may be no GPU to pin for
    row = pack([document(4, {"score": 2.5})], 6, RowFormat((Column("score", "document"),)))
    again = pinned(row)
    assert again.columns["score"].tolist() == [2.5]
    assert again.columns["score"].data_ptr() != row.columns["score"].data_ptr()


def test_a_target_s_column_stands_where_the_target_is_predicted():
    row = pack(
        [document(4, {"a": [1, 2, 3, 4]}), document(3, {"a": 7})], 9, RowFormat((Column("a", "target", fill=-1.0),))
    )
    assert row.columns["a"].tolist() == [2, 3, 4, -1, 7, 7, -1, -1, -1]


def test_a_column_that_nobody_asked_for_goes_nowhere():
    assert pack([document(4, {"a": 1.0})], 4, RowFormat()).columns == {}


@pytest.mark.parametrize(
    ("column", "value", "problem"),
    [
        (Column("a", "token"), [1.0, 2.0], r"has the shape \[2\]; it needs one number, or one for each of 4 tokens"),
        (Column("a", "target"), [[1.0] * 4], r"has the shape \[1, 4\]"),
        (Column("a", "document"), [1.0] * 4, r"has the shape \[4\]; it needs one number$"),
        (Column("a", "document"), "high", "does not hold numbers"),
        (Column("a", "document"), None, "does not hold numbers"),
        (Column("a", "document"), 10**40, "does not hold numbers"),
        (Column("a", "token"), [[1], [1, 2], [3], [4]], "is no array"),
        (Column("a", "token"), [1.0, float("nan"), 1.0, 1.0], "holds a number that is not finite in float32"),
        (Column("a", "document"), 1e300, "holds a number that is not finite in float32"),
        (Column("a", "document", "int8"), 128, "holds a number that int8 has not"),
        (Column("a", "token", "int64"), [1, 2, 3, 0.5], "holds a number that int64 has not"),
        (Column("a", "document", "bool"), 2, "holds a number that bool has not"),
    ],
)
def test_a_column_that_is_none_is_a_bad_sample_with_its_name(column, value, problem):
    made = document(4, {"a": value}, "sample-7")
    for touch in (lambda: check_columns(made, (column,)), lambda: pack([made], 4, RowFormat((column,)))):
        with pytest.raises(BadSample, match=r"sample-7: the column 'a' " + problem) as error:
            touch()
        assert error.value.reason == "bad_column"


def test_numbers_of_numpy_are_numbers():
    values: Mapping[str, object] = {"a": np.float64(0.5), "b": np.arange(4, dtype=np.int16), "c": np.bool_(True)}
    form = RowFormat((Column("a", "document"), Column("b", "token", "int32"), Column("c", "document", "bool")))
    row = pack([document(4, dict(values))], 4, form)
    assert json.dumps({name: column.tolist() for name, column in row.columns.items()}) == (
        '{"a": [0.5], "b": [0, 1, 2, 3], "c": [true]}'
    )
