"""A source's schema: which members or columns hold its fields, and which of its samples are wanted."""

from __future__ import annotations

import dataclasses
import json
import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_gemini.config.data import FieldsConfig, SourceConfig
from megatron_gemini.data.samples.decode_json import decode_json
from megatron_gemini.data.sources.records import RECORD, column_bytes
from megatron_gemini.modalities.bad_sample import FILTERED, FilteredSample

IMAGE_ENDINGS = ("png", "jpg", "jpeg", "webp")
# Where a field is looked for: members of tars first, then the usual names of columns.
USUAL_NAMES: dict[str, tuple[str, ...]] = {
    "text": ("txt", "text", "caption"),
    "image": (*IMAGE_ENDINGS, "image"),
    "codes": ("codes.json", "codes"),
    "audio": ("wav", "flac", "mp3", "ogg", "audio"),
    "video": ("mp4", "video"),
    "items": (RECORD,),
    "messages": (RECORD,),
}
TASK_FIELDS = {
    "caption": ("image", "text"),
    "generate": ("text", "codes"),
    "transcribe": ("audio", "text"),
    "speech_to_image": ("audio", "codes"),
    "video_caption": ("video", "text"),
    "interleave": ("items",),
    "text": ("text",),
    "chat": ("messages",),
}
_COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
    "==": operator.eq,
    "!=": operator.ne,
}
_CONDITION = re.compile(r"\s*([\w.-]+)\s*(>=|<=|==|!=|>|<|\bnot in\b|\bin\b)\s*(.+?)\s*")


@dataclass(frozen=True)
class Condition:
    """One filter: `NAME OP VALUE`, with OP one of >= <= > < == != and `in`, `not in` with values between commas.

    Values that read as numbers are compared as numbers, others as text. A sample without the name does not pass.
    """

    name: str
    compare: str
    values: tuple[float | str, ...]

    @classmethod
    def parse(cls, text: str) -> Condition:
        """Raises ValueError for what is no condition."""
        match = _CONDITION.fullmatch(text)
        if match is None:
            raise ValueError(f"the filter {text!r} is no condition; write, say, similarity >= 0.3 or NSFW in UNLIKELY")
        name, compare, value = match.groups()
        several = compare.endswith("in")
        values = tuple(_plain(part.strip().strip("'\"")) for part in (value.split(",") if several else [value]))
        if compare in (">=", "<=", ">", "<") and isinstance(values[0], str):
            raise ValueError(f"the filter {text!r} compares with {value!r}, which is no number")
        return cls(name, compare, values)

    def holds(self, record: Mapping[str, Any]) -> bool:
        value = record.get(self.name)
        if value is None or isinstance(value, (dict, list)):
            return False
        found = _plain(str(value).lower() if isinstance(value, bool) else str(value))
        if self.compare.endswith("in"):
            return (found in self.values) == (self.compare == "in")
        if self.compare in ("==", "!="):
            return _COMPARE[self.compare](found, self.values[0])
        return isinstance(found, float) and _COMPARE[self.compare](found, self.values[0])


def _plain(text: str) -> float | str:
    try:
        number = float(text)
    except ValueError:
        return text
    return number if math.isfinite(number) else text


@dataclass(frozen=True)
class Schema:
    """names: of every field, where it is looked for, in order; `MEMBER:KEY` is a key of a JSON member."""

    names: Mapping[str, Sequence[str]]
    conditions: tuple[Condition, ...] = ()

    @classmethod
    def of(cls, source: SourceConfig) -> Schema:
        """Raises ValueError for a filter that is no condition."""
        given = {field.name: getattr(source.fields, field.name) for field in dataclasses.fields(FieldsConfig)}
        names = {field: tuple(given[field]) or usual for field, usual in USUAL_NAMES.items()}
        return cls(names, tuple(Condition.parse(text) for text in source.filters))

    def members(self, task: str) -> list[str]:
        """Every member or column that the task's fields and the filters may need."""
        wanted = [name.partition(":")[0] for field in TASK_FIELDS[task] for name in self.names[field]]
        return list(dict.fromkeys([*wanted, *([RECORD] if self.conditions else [])]))

    def find(self, field: str, members: Mapping[str, bytes]) -> list[tuple[str, bytes]]:
        """(name, content) of the field under every name by which the sample has it. Raises BadSample: bad_json."""
        found = []
        for name in self.names[field]:
            member, _, key = name.partition(":")
            content = members.get(member)
            if content is not None and key:
                record = decode_json(content)
                content = column_bytes(record.get(key)) if isinstance(record, dict) else None
            if content is not None:
                found.append((name, content))
        return found

    def check(self, members: Mapping[str, bytes]) -> None:
        """Raise FilteredSample("filtered:NAME") for a sample that does not pass a filter, BadSample for bad JSON."""
        if not self.conditions:
            return
        record = decode_json(members.get(RECORD, b"{}"))
        for condition in self.conditions:
            if not (isinstance(record, dict) and condition.holds(record)):
                value = json.dumps(record.get(condition.name))[:40] if isinstance(record, dict) else "no record"
                raise FilteredSample(f"{FILTERED}{condition.name}", f"{condition.name} is {value}")


USUAL = Schema(USUAL_NAMES)
