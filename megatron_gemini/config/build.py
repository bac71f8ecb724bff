"""From what several sources set to the sections: merged first, and built once from the whole.

So a check between two settings never sees a half-way state, such as a file without the option that goes with it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TypeAlias, TypeVar, cast

from megatron_gemini.config.mistakes import Mistakes
from megatron_gemini.config.schema import (
    CHOICE,
    Chosen,
    Kind,
    Named,
    Section,
    SectionList,
    SectionValue,
    SettingValue,
    default_of,
    kinds,
)

Setting: TypeAlias = "bool | int | float | str | tuple[Setting, ...] | list[Partial] | Partial | None"
Partial: TypeAlias = "dict[str, Setting]"
"""Settings of one source, nested as in a file and of the right types; see `convert`."""
Built = TypeVar("Built", bound=SectionValue)


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
    # A list that `over` gives whole takes the place of the one below: nobody could take an item away otherwise.
    names = {key: f"{name}.{key}" if name else key for key in over}
    return base | {key: merge(base.get(key), value, names[key]) for key, value in over.items()}


def _no_item(name: str, length: int) -> ValueError:
    items = f"has the items 0 to {length - 1}" if length else "is empty"
    return ValueError(f"--{name} does not exist; the list in the file {items}")


def build(section: type[Built], values: Partial, default: Built | None = None, name: str = "") -> Built:
    """An instance of the dataclass `section`; its own checks raise as they are written there, those of all sections
    below it together.

    default: what the values are put on top of, the class's own defaults if none is given.
    """
    arguments, mistakes = {}, Mistakes()
    for key, value in values.items():
        before = default_of(section, key) if default is None else getattr(default, key)
        with mistakes.collected():
            arguments[key] = _built(kinds(section)[key], value, before, f"{name}.{key}" if name else key)
    mistakes.tell()
    return section(**arguments) if default is None else dataclasses.replace(default, **arguments)


def _built(kind: Kind, value: Setting, default: SettingValue, name: str) -> SettingValue:
    match kind:
        case Section(section):
            return build(section, cast("Partial", value), cast("SectionValue", default), name)
        case Chosen():
            values, before = cast("Partial", value), cast("SectionValue", default)
            choice = cast("str", values.get(CHOICE, getattr(before, CHOICE)))
            # Defaults of another kind are another class's; what the section around it had set does not fit them.
            same = before if getattr(before, CHOICE) == choice else None
            return build(kind.of(choice), {CHOICE: choice, **values}, same, name)
        case Named():
            # In the registry's order and not in the file's: ranks run encoders in it, and random streams follow it.
            values, sections = cast("Partial", value), cast("Mapping[str, SectionValue]", default)
            given = {each: cast("Partial", values.get(each, {})) for each in kind.registry.names}
            made, mistakes = {}, Mistakes()
            for each in given:
                with mistakes.collected():
                    made[each] = build(kind.of(each), given[each], sections.get(each), f"{name}.{each}")
            mistakes.tell()
            return made
        case SectionList(section):
            if isinstance(value, dict):  # items of the command line without a list to belong to
                raise _no_item(f"{name}.{next(iter(value))}", 0)
            items, mistakes = [], Mistakes()
            for number, item in enumerate(cast("list[Partial]", value)):
                with mistakes.collected():
                    try:
                        items.append(build(section, item, name=f"{name}.{number}"))
                    except ValueError as error:  # a list item does not know its place, and the user needs it
                        raise ValueError(f"{name}.{number}: {error}") from error
            mistakes.tell()
            return tuple(items)
        case _:
            return cast("SettingValue", value)
