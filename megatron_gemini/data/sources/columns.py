"""Records of tables in the terms of tars: a column is a member, and the whole record is the member `json`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from megatron_gemini.config.schema import Plain

RECORD = "json"
"""The name under which a table gives the whole record, as a tar its metadata."""
Cell: TypeAlias = "Plain | bytes | Mapping[str, Cell] | Sequence[Cell]"
"""What a column of a table holds."""
_COLUMN = "column:"


class Words(bytes):
    """A column's text, in UTF-8. Where an item of a modality is wanted, it may be a file's name or a data URL."""


class FileName(Words):
    """The path of a mapping that names a file, as tables of the Hugging Face hub hold images: no text to learn."""


class Structure(bytes):
    """A column's list, mapping or number, as JSON. Text that looks the same is `Words`."""


def column_bytes(value: Cell) -> bytes | None:
    """A column's value as a member's content: `Words` for text, `Structure` for other plain data, None for nothing.

    A mapping with "bytes" is that content, and one with a "path" alone the words of the path: so tables of the Hugging
    Face hub hold images and sounds. NaN is nothing: so pandas writes that a value is missing.
    """
    if isinstance(value, Mapping) and isinstance(value.get("bytes"), bytes):
        value = value["bytes"]
    elif isinstance(value, Mapping) and value and value.keys() <= {"bytes", "path"} and value.get("bytes") is None:
        value = value.get("path")
        if isinstance(value, str):
            return FileName(value.encode("utf-8", "surrogatepass"))
    if value is None or is_missing(value):
        return None
    if isinstance(value, bytes):
        return value
    if isinstance(value, str):
        return Words(value.encode("utf-8", "surrogatepass"))  # which decoding refuses, and counts
    return Structure(json.dumps(value, default=str).encode())


def is_missing(value: Cell) -> bool:
    """Whether it is a NaN."""
    return isinstance(value, float) and value != value


def record_bytes(record: Mapping[str, Cell]) -> bytes:
    """A whole record as JSON, in which bytes are names by which `named_cell` finds them."""
    return Structure(json.dumps(_with_names(record, []), default=str).encode())


def _with_names(value: Cell, place: list[str | int]) -> Cell:
    if isinstance(value, bytes) or (isinstance(value, Mapping) and isinstance(value.get("bytes"), bytes)):
        return _COLUMN + json.dumps(place)
    if isinstance(value, Mapping):
        return {name: _with_names(each, [*place, name]) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_with_names(each, [*place, number]) for number, each in enumerate(value)]
    return value


def named_column(name: str) -> list[str | int] | None:
    """The place in a record that a name of `record_bytes` says, its column first; None for any other name."""
    if not name.startswith(_COLUMN):
        return None
    try:
        place = json.loads(name.removeprefix(_COLUMN))
    except (ValueError, RecursionError):  # anybody may write such a name into a record
        return None
    right = isinstance(place, list) and place and isinstance(place[0], str)
    return place if right and all(isinstance(each, (str, int)) for each in place) else None


def named_cell(record: Mapping[str, Cell], place: Sequence[str | int]) -> Cell:
    """What lies at a place of a record; None if there is nothing."""
    value: Cell = record
    for each in place:
        if isinstance(value, Mapping) and isinstance(each, str):
            value = value.get(each)
        elif isinstance(value, (list, tuple)) and isinstance(each, int) and 0 <= each < len(value):
            value = value[each]
        else:
            return None
    return value
