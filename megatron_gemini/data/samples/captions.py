"""The texts of a sample, in whatever form its members or columns have them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from megatron_gemini.data.samples.decode_json import decode_json
from megatron_gemini.data.samples.references import shown
from megatron_gemini.data.sources.columns import FileName, Structure, is_missing
from megatron_gemini.modalities.bad_sample import BadSample
from megatron_gemini.modalities.text.preprocess import decode_text

if TYPE_CHECKING:
    from megatron_gemini.config.schema import Plain


def captions(found: Sequence[tuple[str, bytes]]) -> list[str]:
    """Every text that a sample has, in order, from the (name, content) of its members or columns.

    A list is several texts, and what is missing or empty among others is left out. There is none if all are missing.
    Raises BadSample: bad_text, empty_text where there are only empty ones, text_by_key for a mapping.
    """
    contents = [content for name, given in found for content in _contents(name, given)]
    filled = [content for content in contents if content.strip()] or contents[:1]
    return [decode_text(content) for content in filled]


def _contents(name: str, given: bytes) -> Iterator[bytes]:
    if isinstance(given, FileName):
        raise BadSample("bad_text", f"{name} names the file {shown(given.decode(errors='replace'))}, which is no text")
    if not isinstance(given, Structure):
        yield given
        return
    value = decode_json(given)
    for each in value if isinstance(value, list) else [value]:
        if each is not None and not is_missing(each):
            yield _one(name, each).encode("utf-8", "surrogatepass")


def _one(name: str, value: Plain) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, dict) and value:
        keys = list(value)
        raise BadSample(
            "text_by_key",
            f"{name} has the keys {', '.join(keys)[:80]}; choose one, as in fields: {{text: [{name}:{keys[0][:20]}]}}",
        )
    if isinstance(value, float) and value.is_integer():  # what pandas makes of whole numbers beside a missing one
        return str(int(value))
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return str(value)
    raise BadSample("bad_text", f"{name} holds {str(value)[:80]!r}, which is no text")
