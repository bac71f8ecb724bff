"""What a setting may hold, read once from the dataclasses' annotations.

Beside the scalars, lists and sections of dataclasses there are two kinds of section that a registry completes. So a
plugin's settings are read, checked, shown and saved like built-in ones:

- `Annotated[Mapping[str, Base], Named(REGISTRY)]`: one section for every registered name, such as `encoders`.
- `Annotated[Base, Chosen(REGISTRY)]`: one section, whose setting `kind` names the entry that has its type.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, Protocol, TypeAlias, get_args, get_origin, get_type_hints

Plain: TypeAlias = "bool | int | float | str | list[Plain] | dict[str, Plain] | None"
"""What YAML and JSON hold."""
Given: TypeAlias = "Plain | Mapping[str, Given] | Sequence[Given]"
"""What a source of settings holds: plain data, or read-only views of it."""
Choices: TypeAlias = Mapping[str, str]
"""The `kind` of every `Chosen` section, by the dotted name of the section."""
CHOICE = "kind"
"""The setting of a `Chosen` section that decides its type."""
MAY_CHANGE: Mapping[str, bool] = {"may_change": True}
"""Metadata of a field: a run that goes on may have another value, see `on_resume`."""


class SectionValue(Protocol):
    """An instance of a section: of any dataclass."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[SettingValue]]]


SettingValue: TypeAlias = (
    "bool | int | float | str | tuple[SettingValue, ...] | Mapping[str, SettingValue] | SectionValue"
)
"""What a field of a section holds."""


class HasSection(Protocol):
    """An entry of a registry that has settings. section: their dataclass."""

    @property
    def section(self) -> type[SectionValue]: ...


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

    def of(self, name: str) -> type[SectionValue]:
        return self.registry.get(name).section


@dataclass(frozen=True, eq=False)
class Chosen:
    """One section, of the type that the registry has for its `kind`. default: the kind where none is named."""

    registry: Sections
    default: str = ""

    def of(self, choice: str) -> type[SectionValue]:
        return self.registry.get(choice).section


@dataclass(frozen=True)
class Section:
    """A section of a fixed type."""

    type: type[SectionValue]


@dataclass(frozen=True)
class SectionList:
    """A list of sections of a type."""

    type: type[SectionValue]


@dataclass(frozen=True)
class Scalar:
    """One value of a type, and of these choices if there are any."""

    type: type[bool] | type[int] | type[float] | type[str]
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Values:
    """A list of scalars."""

    item: Scalar


@dataclass(frozen=True)
class ScalarTable:
    """Names of the user's choice, each with a scalar or a list of scalars."""

    item: Scalar | Values


Kind: TypeAlias = Section | SectionList | Scalar | Values | ScalarTable | Named | Chosen


@functools.cache
def kinds(section: type[SectionValue]) -> dict[str, Kind]:
    """Names and kinds of the settings of a dataclass."""
    hints = get_type_hints(section, include_extras=True)
    found = {each.name: _kind(hints[each.name]) for each in dataclasses.fields(section)}
    for name, kind in found.items():
        if isinstance(kind, Chosen):
            default = default_of(section, name)  # a plugin's encoder may begin with another connector than others
            choice = getattr(default, CHOICE)
            assert type(default) is kind.of(choice), f"{section.__name__}.{name}: the kind {choice} has another section"
            found[name] = Chosen(kind.registry, choice)
    return found


def _kind(hint: type) -> Kind:
    if get_origin(hint) is Annotated:
        mark = get_args(hint)[1]
        assert isinstance(mark, (Named, Chosen)), hint
        return mark
    if dataclasses.is_dataclass(hint):
        return Section(hint)
    if get_origin(hint) is tuple and dataclasses.is_dataclass(get_args(hint)[0]):
        return SectionList(get_args(hint)[0])
    if get_origin(hint) is Mapping:
        return ScalarTable(_scalar_or_values(get_args(hint)[1]))
    return _scalar_or_values(hint)


def _scalar_or_values(hint: type) -> Scalar | Values:
    if get_origin(hint) is tuple:
        return Values(Scalar(get_args(hint)[0]))
    if get_origin(hint) is Literal:
        return Scalar(str, get_args(hint))
    assert hint in (bool, int, float, str), f"a setting cannot be {hint}"
    return Scalar(hint)


# Not kept from one call to the next, as `kinds` is: a `Named` default has all that is registered now.
def default_of(section: type[SectionValue], name: str) -> SettingValue:
    """What a field holds where nothing is set. Every setting has a default."""
    field = section.__dataclass_fields__[name]
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    assert field.default is not dataclasses.MISSING, f"{section.__name__}.{name} has no default"
    return field.default


def settled(kind: Kind, name: str, choices: Choices) -> Kind:
    """`kind`, and of a `Chosen` one the section that is chosen for the setting `name`."""
    return Section(kind.of(choices.get(name, kind.default))) if isinstance(kind, Chosen) else kind


def below(kind: Kind, name: str) -> Kind | None:
    """The kind of the setting `name` (a number for an item of a list) below a settled one; None if there is none."""
    match kind:
        case Section(section):
            return kinds(section).get(name)
        case SectionList(section):
            return Section(section) if name.isdecimal() else None  # whether the list is as long, `merge` knows
        case Named():
            return Section(kind.of(name)) if name in kind.registry else None
        case ScalarTable(item):
            return item if name else None  # `--objective.weights. 1` has forgotten the name
        case _:
            return None


def names_below(kind: Kind) -> list[str]:
    """Names of the settings directly below a settled kind, without the numbers of a list and the keys of a table."""
    match kind:
        case Section(section):
            return list(kinds(section))
        case Named():
            return list(kind.registry.names)
        case _:
            return []


def setting_names(kind: Kind, choices: Choices, prefix: str = "") -> list[str]:
    """Dotted names of every setting below a settled kind, without the items of lists and tables."""
    names = []
    for name in names_below(kind):
        inner = below(kind, name)
        assert inner is not None
        inner = settled(inner, prefix + name, choices)
        names += setting_names(inner, choices, f"{prefix}{name}.") if names_below(inner) else [prefix + name]
    return names
