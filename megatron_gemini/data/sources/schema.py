"""A source's schema: which members or columns hold its fields, and which of its samples are wanted."""

from __future__ import annotations

import json
import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_gemini.data.samples.decode_json import decode_json
from megatron_gemini.data.samples.kinds import item_kinds
from megatron_gemini.data.sources.columns import RECORD, column_bytes
from megatron_gemini.modalities.bad_sample import FILTERED, FilteredSample
from megatron_gemini.registry import TASKS

if TYPE_CHECKING:
    from megatron_gemini.config.data import SourceConfig
    from megatron_gemini.config.schema import Plain
    from megatron_gemini.data.samples.spec import TaskSpec

_ORDER: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
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
        # Metadata hold numbers as text ("pwatermark": "0.2"), so that what reads as a number is one.
        values = tuple(_plain(part.strip().strip("'\"")) for part in (value.split(",") if several else [value]))
        if compare in _ORDER and isinstance(values[0], str):
            raise ValueError(f"the filter {text!r} compares with {value!r}, which is no number")
        return cls(name, compare, values)

    def holds(self, record: Mapping[str, Plain]) -> bool:
        value = record.get(self.name)
        if value is None or isinstance(value, (dict, list)):
            return False
        found = _plain(str(value).lower() if isinstance(value, bool) else str(value))
        if self.compare not in _ORDER:
            return (found in self.values) == (self.compare in ("in", "=="))
        limit = self.values[0]
        return isinstance(found, float) and isinstance(limit, float) and _ORDER[self.compare](found, limit)


def _plain(text: str) -> float | str:
    try:
        number = float(text)
    except ValueError:
        return text
    return number if math.isfinite(number) else text


@dataclass(frozen=True)
class Schema:
    """Where the fields of a source's samples are, and which samples are wanted.

    task: what the source is read for. names: of every field, where it is looked for, in order; `MEMBER:KEY` is a key
    of a JSON member.
    """

    task: TaskSpec
    names: Mapping[str, Sequence[str]]
    conditions: tuple[Condition, ...] = ()

    @classmethod
    def of(cls, source: SourceConfig) -> Schema:
        """Raises ValueError for a filter that is no condition."""
        task = TASKS.get(source.task)
        usual = {**item_kinds(), **{field.name: field.members for field in task.own_fields}}
        names = {field: source.fields.get(field) or members for field, members in usual.items()}
        return cls(task, names, tuple(Condition.parse(text) for text in source.filters))

    def members(self, *fields: str) -> list[str]:
        """Every member or column that the fields, those of the task if there are none, and the filters may need."""
        fields = fields or self.task.field_names
        wanted = [name.partition(":")[0] for field in fields for name in self.names[field]]
        return list(dict.fromkeys([*wanted, *([RECORD] if self.conditions else [])]))

    def find(self, field: str, members: Mapping[str, bytes]) -> list[tuple[str, bytes]]:
        """(name, content) of the field under every name by which the sample has it. Raises BadSample: bad_json."""
        found = []
        for name in self.names[field]:
            member, _, key = name.partition(":")
            content = members.get(member)
            if content is not None and key:  # a member without that key does not have the field, and the next name may
                content = column_bytes(_at(decode_json(content), key))
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


def _at(value: Plain, key: str) -> Plain:
    """What a JSON value has under `KEY` or `KEY:KEY`, in a list that of every entry; None for nothing."""
    if isinstance(value, list):
        return [_at(each, key) for each in value]
    if not isinstance(value, dict):
        return None
    first, _, rest = key.partition(":")
    return value[key] if key in value else _at(value.get(first), rest) if rest else None
