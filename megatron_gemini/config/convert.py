"""From plain mappings (YAML, command line) to the types of the sections, with errors that name the setting.

Every source of settings is first checked on its own into a *partial*: a nested dict that has the shape of `RunConfig`,
holds only what the source sets, and only values of the right type. Partials merge; the sections are built once, from
the merged whole, so that a check between two settings never sees a half-way state.

The type of a section may hang on its `kind`, which may stand in another source than the rest of it. So `choices` looks
for those first, in all sources.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias, TypeVar, cast

from megatron_gemini.config.schema import (
    CHOICE,
    Choices,
    Chosen,
    Given,
    Items,
    Kind,
    Named,
    Scalar,
    Section,
    SectionValue,
    SettingValue,
    Table,
    Values,
    below,
    default_of,
    kinds,
    names_below,
    settled,
)

Setting: TypeAlias = "bool | int | float | str | tuple[Setting, ...] | list[Partial] | Partial | None"
Partial: TypeAlias = "dict[str, Setting]"
Built = TypeVar("Built", bound=SectionValue)


@dataclass(frozen=True)
class SettingSource:
    """Where settings come from."""

    label: str
    """Put before a setting's name in errors: `run.yaml: ` or `--`."""
    text: bool = False
    """Values are texts of the command line, to be read by the setting's type."""
    choices: Choices = field(default_factory=dict)
    """Of all sources together."""
    names: tuple[str, ...] = ()
    """Every valid dotted name, to suggest from."""

    def error(self, name: str, problem: str) -> ValueError:
        return ValueError(f"{self.label}{name} {problem}")


def choices(given: Sequence[tuple[Given, SettingSource]], kind: Kind, name: str = "") -> dict[str, str]:
    """The `kind` of every `Chosen` section below `kind`, by the section's name. Of several sources the last decides.

    given: what each source holds for the setting `name`. Raises a `ValueError` for a kind that is not registered.
    """
    sections = [(value, source) for value, source in given if isinstance(value, Mapping)]
    found: dict[str, str] = {}
    if isinstance(kind, Chosen):
        found[name] = kind.default
        for section, source in sections:
            chosen = section.get(CHOICE, kind.default)
            if not isinstance(chosen, str) or chosen not in kind.registry:
                raise source.error(f"{name}.{CHOICE}", f"is {_shown(chosen)}; {kind.registry.nearest(str(chosen))}")
            found[name] = chosen if CHOICE in section else found[name]
    kind = settled(kind, name, found)
    for key in names_below(kind):
        inner = below(kind, key)
        if isinstance(inner, (Section, Named, Chosen)):
            values = [(section.get(key), source) for section, source in sections]
            found |= choices(values, inner, f"{name}.{key}" if name else key)
    return found


def partial(mapping: Mapping[str, Given], kind: Kind, source: SettingSource, prefix: str = "") -> Partial:
    """Check a mapping against a settled section of `kind`, whose settings are called `prefix` + name.

    Raises a `ValueError` on an unknown name (with the nearest valid one) or a value of another type.
    """
    values: Partial = {}
    for key, value in mapping.items():
        name = f"{prefix}{key}"
        inner = below(kind, str(key))
        if inner is None:
            raise unknown(name, kind, source)
        values[str(key)] = _value(value, settled(inner, name, source.choices), name, source)
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


def build(section: type[Built], values: Partial, default: Built | None = None, name: str = "") -> Built:
    """An instance of the dataclass `section`; its own checks raise as they are written there.

    default: what the values are put on top of, the class's own defaults if none is given.
    """
    arguments = {}
    for key, value in values.items():
        before = default_of(section, key) if default is None else getattr(default, key)
        arguments[key] = _built(kinds(section)[key], value, before, f"{name}.{key}" if name else key)
    return section(**arguments) if default is None else dataclasses.replace(default, **arguments)


def _built(kind: Kind, value: Setting, default: SettingValue, name: str) -> SettingValue:
    match kind:
        case Section(section):
            return build(section, cast("Partial", value), cast("SectionValue", default), name)
        case Chosen():
            values, before = cast("Partial", value), cast("SectionValue", default)
            choice = cast("str", values.get(CHOICE, getattr(before, CHOICE)))
            same = before if getattr(before, CHOICE) == choice else None
            return build(kind.of(choice), {CHOICE: choice, **values}, same, name)
        case Named():
            values, sections = cast("Partial", value), cast("Mapping[str, SectionValue]", default)
            given = {each: cast("Partial", values.get(each, {})) for each in kind.registry.names}
            return {each: build(kind.of(each), given[each], sections.get(each), f"{name}.{each}") for each in given}
        case Items(section):
            if isinstance(value, dict):  # items of the command line without a list to belong to
                raise _no_item(f"{name}.{next(iter(value))}", 0)
            items = cast("list[Partial]", value)
            return tuple(_built_item(section, item, f"{name}.{i}") for i, item in enumerate(items))
        case _:
            return cast("SettingValue", value)


def _built_item(section: type[Built], values: Partial, name: str) -> Built:
    try:
        return build(section, values, name=name)
    except ValueError as error:  # a list item does not know its place, and the user needs it
        raise ValueError(f"{name}: {error}") from error


def unknown(name: str, parent: Kind, source: SettingSource) -> ValueError:
    """The error for a name that does not exist, with the same last part in another section or a similar name.

    parent: the settled kind of the innermost section that exists, which has no setting of this name.
    """
    prefix, _, last = name.rpartition(".")
    siblings = [f"{prefix}.{known}" if prefix else known for known in names_below(parent)]
    if isinstance(parent, Named):  # a name that may be a plugin's: what other sections have is no help
        return source.error(name, f"is no setting; {parent.registry.nearest(last)}")
    elsewhere = [other for other in source.names if other.rpartition(".")[2] == last]
    beside = {other.rpartition(".")[2]: other for other in siblings}
    close = difflib.get_close_matches(name, elsewhere, n=1, cutoff=0.0)
    close += [beside[other] for other in difflib.get_close_matches(last, beside, n=1)]
    close += difflib.get_close_matches(name, source.names, n=1, cutoff=0.8)
    if close:
        return source.error(name, f"is no setting; did you mean {'--' if source.text else ''}{close[0]}?")
    chosen = source.choices.get(prefix)
    of = f" of {prefix}.{CHOICE} {chosen}" if chosen else ""
    return source.error(name, f"is no setting{of}; there are {', '.join(siblings)}")


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


_WANTED: dict[type, str] = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


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
