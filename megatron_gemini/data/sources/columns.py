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


def column_bytes(value: Cell) -> bytes | None:
    """A column's value as a member's content: text in UTF-8, other plain data as JSON, None where there is nothing.

    A mapping with "bytes" is that content: so tables of the Hugging Face hub hold images and sounds.
    """
    if isinstance(value, Mapping) and isinstance(value.get("bytes"), bytes):
        value = value["bytes"]
    if value is None or isinstance(value, bytes):
        return value
    if isinstance(value, str):
        return value.encode("utf-8", "surrogatepass")  # which decoding refuses, and counts
    return json.dumps(value, default=str).encode()


def is_binary(value: Cell) -> bool:
    """Whether a column holds bytes, which JSON cannot."""
    return isinstance(value, bytes) or (isinstance(value, Mapping) and isinstance(value.get("bytes"), bytes))
