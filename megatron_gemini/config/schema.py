"""What a setting may hold, read once from the dataclasses' annotations.

Beside the scalars, lists and sections of dataclasses there are two kinds of section that a registry completes, so that
a plugin's settings are read, checked, shown and saved like built-in ones:

- `Annotated[Mapping[str, Base], Named(REGISTRY)]`: one section for every registered name, such as `encoders`.
- `Annotated[Base, Chosen(REGISTRY)]`: one section, whose setting `kind` names the entry that has its type.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal, Protocol, TypeAlias, get_args, get_origin, get_type_hints

Plain: TypeAlias = "bool | int | float | str | list[Plain] | dict[str, Plain] | None"
"""What YAML and JSON hold."""


class HasSection(Protocol):
    """An entry of a registry that has settings. section: their dataclass."""

    @property
    def section(self) -> type: ...


class Sections(Protocol):
    """What is needed of a registry here."""

    @property
    def names(self) -> tuple[str, ...]: ...

    def nearest(self, name: str) -> str: ...

    def get(self, name: str) -> HasSection: ...

    def __contains__(self, name: str) -> bool: ...


@dataclass(frozen=True, eq=False)
class Named:
    """A section for each name of a registry."""

    registry: Sections

    def of(self, name: str) -> type:
        return self.registry.get(name).section


@dataclass(frozen=True, eq=False)
class Chosen:
    """One section, of the type that the registry has for its `kind`."""

    registry: Sections

    def of(self, kind: str) -> type:
        return self.registry.get(kind).section


@dataclass(frozen=True)
class Section:
    """A section of a fixed type."""

    type: type


@dataclass(frozen=True)
class Items:
    """A list of sections of a type."""

    type: type


@dataclass(frozen=True)
class Scalar:
    """One value of a type, and of these choices if there are any."""

    type: type
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Values:
    """A list of scalars."""

    item: Scalar


@dataclass(frozen=True)
class Table:
    """Names of the user's choice, each with a scalar or a list of scalars."""

    item: Scalar | Values


Kind: TypeAlias = Section | Items | Scalar | Values | Table | Named | Chosen


@functools.cache
def kinds(section: type) -> dict[str, Kind]:
    """Names and kinds of the settings of a dataclass."""
    hints = get_type_hints(section, include_extras=True)
    return {each.name: _kind(hints[each.name]) for each in dataclasses.fields(section)}


def _kind(hint: type) -> Kind:
    if get_origin(hint) is Annotated:
        mark = get_args(hint)[1]
        assert isinstance(mark, (Named, Chosen)), hint
        return mark
    if dataclasses.is_dataclass(hint):
        return Section(hint)
    if get_origin(hint) is tuple and dataclasses.is_dataclass(get_args(hint)[0]):
        return Items(get_args(hint)[0])
    if get_origin(hint) is Mapping:
        item = _scalar_or_values(get_args(hint)[1])
        return Table(item)
    return _scalar_or_values(hint)


def _scalar_or_values(hint: type) -> Scalar | Values:
    if get_origin(hint) is tuple:
        return Values(Scalar(get_args(hint)[0]))
    if get_origin(hint) is Literal:
        return Scalar(str, get_args(hint))
    return Scalar(hint)


def below(kind: Kind, name: str) -> Kind | None:
    """The kind of the setting `name` (a number for an item of a list) below one of `kind`; None where there is none.

    Below a `Chosen` section are the settings of all its entries, since its `kind` may stand in another source.
    """
    match kind:
        case Section(section):
            return kinds(section).get(name)
        case Items(section):
            return Section(section) if name.isdecimal() else None
        case Named():
            return Section(kind.of(name)) if name in kind.registry else None
        case Chosen():
            found = (kinds(kind.of(each)).get(name) for each in kind.registry.names)
            return next((each for each in found if each is not None), None)
        case Table(item):
            return item
        case _:
            return None


def names_below(kind: Kind) -> list[str]:
    """Names of the settings directly below one of `kind`, without the numbers of a list and the keys of a table."""
    match kind:
        case Section(section):
            return list(kinds(section))
        case Named():
            return list(kind.registry.names)
        case Chosen():
            return list(dict.fromkeys(name for each in kind.registry.names for name in kinds(kind.of(each))))
        case _:
            return []


def setting_names(kind: Kind, prefix: str = "") -> list[str]:
    """Dotted names of every setting below one of `kind`, without the items of lists and tables."""
    names = []
    for name in names_below(kind):
        inner = below(kind, name)
        assert inner is not None
        names += setting_names(inner, f"{prefix}{name}.") if names_below(inner) else [prefix + name]
    return names
