"""From plain mappings (YAML, command line) to the types of the sections, with errors that name the setting.

Every source of settings is first checked on its own into a *partial*: a nested dict that has the shape of `RunConfig`,
holds only what the source sets, and only values of the right type. Partials merge; the sections are built once, from
the merged whole, so that a check between two settings never sees a half-way state.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias, TypeVar, cast

from megatron_gemini.config.schema import (
    Chosen,
    Items,
    Kind,
    Named,
    Plain,
    Scalar,
    Section,
    Table,
    Values,
    below,
    kinds,
    names_below,
)

Setting: TypeAlias = "bool | int | float | str | tuple[Setting, ...] | list[Partial] | Partial | None"
Partial: TypeAlias = "dict[str, Setting]"
Built = TypeVar("Built")
CHOICE = "kind"
"""The setting of a `Chosen` section that decides its type."""


Given: TypeAlias = "Plain | Mapping[str, Given] | Sequence[Given]"


@dataclass(frozen=True)
class SettingSource:
    """Where settings come from."""

    label: str
    """Put before a setting's name in errors: `run.yaml: ` or `--`."""
    text: bool = False
    """Values are texts of the command line, to be read by the setting's type."""
    names: tuple[str, ...] = ()
    """Every valid dotted name, to suggest from."""

    def error(self, name: str, problem: str) -> ValueError:
        return ValueError(f"{self.label}{name} {problem}")


def partial(mapping: Mapping[str, Given], kind: Kind, source: SettingSource, prefix: str = "") -> Partial:
    """Check a mapping against a section of `kind`, whose settings are called `prefix` + name.

    Raises a `ValueError` on an unknown name (with the nearest valid one) or a value of another type.
    """
    values: Partial = {}
    for key, value in mapping.items():
        name = f"{prefix}{key}"
        inner = below(kind, str(key))
        if inner is None:
            raise unknown(name, [prefix + known for known in names_below(kind)], source)
        values[str(key)] = _value(value, inner, name, source)
    return values


def merge(base: Setting, over: Setting, name: str = "") -> Setting:
    """`base` with the settings of `over` put on top; a list is replaced, or changed in the items that `over` numbers.

    Raises a `ValueError` for the number of an item that the list does not have.
    """
    if not isinstance(over, dict) or base is None:
        return over
    if isinstance(base, list):
        merged = dict(enumerate(base))
        for number, item in over.items():
            if int(number) not in merged:
                raise _no_item(f"{name}.{number}", len(base))
            merged[int(number)] = cast("Partial", merge(merged[int(number)], item, f"{name}.{number}"))
        return list(merged.values())
    assert isinstance(base, dict)
    names = {key: f"{name}.{key}" if name else key for key in over}
    return base | {key: merge(base.get(key), value, names[key]) for key, value in over.items()}


def _no_item(name: str, length: int) -> ValueError:
    items = f"has the items 0 to {length - 1}" if length else "is empty"
    return ValueError(f"--{name} does not exist; the list in the file {items}")


def build(section: type[Built], values: Partial, name: str = "") -> Built:
    """An instance of the dataclass `section`; its own checks raise as they are written there."""
    known = kinds(cast("type", section))
    for key in values:
        if key not in known:  # a setting of another `kind` than the chosen one
            raise ValueError(
                f"{name}.{key} is no setting of {name}.{CHOICE} {values[CHOICE]}; there are {', '.join(known)}"
            )
    arguments = {key: _built(known[key], value, f"{name}.{key}" if name else key) for key, value in values.items()}
    return section(**arguments)


def build_named(kind: Named, values: Partial, name: str) -> dict[str, object]:
    """The sections of a `Named` kind: every registered name has one, with its defaults where nothing is set."""
    sections = {each: values.get(each, {}) for each in kind.registry.names}
    return {each: build(kind.of(each), cast("Partial", given), f"{name}.{each}") for each, given in sections.items()}


def _built(kind: Kind, value: Setting, name: str) -> object:
    match kind:
        case Section(section):
            return build(section, cast("Partial", value), name)
        case Chosen():
            return build_chosen(kind, cast("Partial", value), name)
        case Named():
            return build_named(kind, cast("Partial", value), name)
        case Items(section):
            if isinstance(value, dict):  # items of the command line without a list to belong to
                raise _no_item(f"{name}.{next(iter(value))}", 0)
            return tuple(
                _built_item(section, item, f"{name}.{i}") for i, item in enumerate(cast("list[Partial]", value))
            )
        case _:
            return value


def build_chosen(kind: Chosen, values: Partial, name: str) -> object:
    """The section of a `Chosen` kind. Raises a `ValueError` for a `kind` that is not registered."""
    choice = values.get(CHOICE, kind.registry.names[0])
    assert isinstance(choice, str)
    if choice not in kind.registry:
        raise ValueError(f"{name}.{CHOICE} is {choice!r}; {kind.registry.nearest(choice)}")
    return build(kind.of(choice), {CHOICE: choice, **values}, name)


def _built_item(section: type, values: Partial, name: str) -> object:
    try:
        return build(section, values, name)
    except ValueError as error:  # a list item does not know its place, and the user needs it
        raise ValueError(f"{name}: {error}") from error


def unknown(name: str, siblings: Sequence[str], source: SettingSource) -> ValueError:
    """The error for a name that does not exist, with the same last part in another section or a similar name."""
    last = name.rpartition(".")[2]
    elsewhere = [other for other in source.names if other.rpartition(".")[2] == last]
    beside = {other.rpartition(".")[2]: other for other in siblings}
    close = difflib.get_close_matches(name, elsewhere, n=1, cutoff=0.0)
    close += [beside[other] for other in difflib.get_close_matches(last, beside, n=1)]
    close += difflib.get_close_matches(name, source.names, n=1, cutoff=0.8)
    if close:
        return source.error(name, f"is no setting; did you mean {'--' if source.text else ''}{close[0]}?")
    return source.error(name, f"is no setting; there are {', '.join(siblings)}")


def _value(value: Given, kind: Kind, name: str, source: SettingSource) -> Setting:
    match kind:
        case Section() | Named() | Chosen() | Table():
            if value is None:  # `train:` with everything below it commented out
                return {}
            if not isinstance(value, Mapping):
                raise source.error(name, f"is {_shown(value)}; it is a section, with settings of its own below it")
            return partial(value, kind, source, f"{name}.")
        case Items():
            return _items(value, kind, name, source)
        case Values(item):
            if not isinstance(value, (list, tuple)):
                raise source.error(name, f"is {_shown(value)}; it must be a list")
            return tuple(_scalar(v, item, f"{name}.{i}", source) for i, v in enumerate(value))
        case Scalar():
            return _scalar(value, kind, name, source)


def _items(value: Given, kind: Items, name: str, source: SettingSource) -> Setting:
    item = Section(kind.type)
    if isinstance(value, Mapping) and source.text:  # the command line changes items by their number
        return {str(index): _value(v, item, f"{name}.{index}", source) for index, v in value.items()}
    if source.text:
        raise source.error(name, f"is a list of sections; write it in the file, or set --{name}.0.FIELD of its items")
    if not isinstance(value, (list, tuple)) or not all(isinstance(v, Mapping) for v in value):
        fields = ", ".join(kinds(kind.type))
        raise source.error(name, f"is {_shown(value)}; it must be a list of mappings, each with {fields}")
    return [cast("Partial", _value(v, item, f"{name}.{i}", source)) for i, v in enumerate(value)]


_WANTED = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def _scalar(value: Given, kind: Scalar, name: str, source: SettingSource) -> bool | int | float | str:
    if kind.choices:
        if not isinstance(value, str) or value not in kind.choices:
            raise source.error(name, f"is {_shown(value)}; choose one of {', '.join(kind.choices)}")
        return value
    converted = _from_text(value, kind.type) if source.text else _from_data(value, kind.type)
    if converted is None:
        hint = "; put it in quotes" if kind.type is str and not isinstance(value, (list, dict)) else ""
        raise source.error(name, f"is {_shown(value)}; it must be {_WANTED[kind.type]}{hint}")
    if isinstance(converted, float) and not math.isfinite(converted):
        raise source.error(name, f"is {_shown(value)}; it must be a finite number")
    return converted


def _from_text(value: Given, kind: type) -> bool | int | float | str | None:
    """A command line's text as `kind`, or None. A switch without a value is already a bool."""
    if kind is bool:
        return value if isinstance(value, bool) else {"true": True, "false": False}.get(str(value).lower())
    try:
        return None if isinstance(value, bool) else kind(value)
    except ValueError:
        return None


def _from_data(value: Given, kind: type) -> bool | int | float | str | None:
    """A YAML value as `kind`, or None. PyYAML reads 1e-3 (no dot) as text, which is a number to everyone else."""
    if kind is float and not isinstance(value, bool) and isinstance(value, (int, float, str)):
        try:
            return float(value)
        except (ValueError, OverflowError):
            return None
    return cast("bool | int | float | str", value) if type(value) is kind else None


def _shown(value: Given) -> str:
    text = repr(value)
    text = text if len(text) <= 60 else text[:57] + "..."
    return text if isinstance(value, str) else f"{text} ({type(value).__name__})"
