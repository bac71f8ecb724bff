"""From plain mappings (YAML, command line) to values of the settings' types, with errors that name the setting.

Every source of settings is checked on its own into a *partial*: a nested dict that has the shape of `RunConfig`, holds
only what the source sets, and only values of the right type. `build` makes sections of all partials together.

The type of a section may hang on its `kind`, which may stand in another source than the rest of it. So `choices` looks
for those first, in all sources.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

from megatron_gemini.config.build import Partial, Setting
from megatron_gemini.config.mistakes import Mistakes
from megatron_gemini.config.schema import (
    CHOICE,
    Choices,
    Chosen,
    Given,
    Kind,
    Named,
    Scalar,
    ScalarTable,
    Section,
    SectionList,
    Values,
    below,
    kinds,
    names_below,
    settled,
)


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
    # By the names that there are and not by those that are given: unknown ones are `partial`'s to tell.
    for key in names_below(kind):
        inner = below(kind, key)
        if isinstance(inner, (Section, Named, Chosen)):
            values = [(section.get(key), source) for section, source in sections]
            found |= choices(values, inner, f"{name}.{key}" if name else key)
    return found


def partial(mapping: Mapping[str, Given], kind: Kind, source: SettingSource, prefix: str = "") -> Partial:
    """Check a mapping against a settled section of `kind`, whose settings are called `prefix` + name.

    Raises a `ValueError` on unknown names (with the nearest valid one) and values of another type, of all of them.
    """
    values: Partial = {}
    mistakes = Mistakes()
    for key, value in mapping.items():  # YAML's keys may be numbers, which no setting is called
        with mistakes.collected():
            name = f"{prefix}{key}"
            inner = below(kind, str(key))
            if inner is None:
                raise unknown(name, kind, source)
            values[str(key)] = _value(value, settled(inner, name, source.choices), name, source)
    mistakes.tell()
    return values


def unknown(name: str, parent: Kind, source: SettingSource) -> ValueError:
    """The error for a name that does not exist, with the same last part in another section or a similar name.

    parent: the settled kind of the innermost section that exists, which has no setting of this name.
    """
    prefix, _, last = name.rpartition(".")
    siblings = [f"{prefix}.{known}" if prefix else known for known in names_below(parent)]
    if isinstance(parent, Named):  # a name that may be a plugin's: what other sections have is no help
        return source.error(name, f"is no setting; {parent.registry.nearest(last)}")
    # The same last part in another section comes first: whoever writes model.lr means optimizer.lr, not model.layers.
    elsewhere = [other for other in source.names if other.rpartition(".")[2] == last]
    beside = {other.rpartition(".")[2]: other for other in siblings}
    close = difflib.get_close_matches(name, elsewhere, n=1, cutoff=0.0)
    close += [beside[other] for other in difflib.get_close_matches(last, beside, n=1)]
    # Of the whole name only a near one, since all settings of a long section are somewhat alike.
    close += difflib.get_close_matches(name, source.names, n=1, cutoff=0.8)
    if close:
        return source.error(name, f"is no setting; did you mean {'--' if source.text else ''}{close[0]}?")
    chosen = source.choices.get(prefix)
    of = f" of {prefix}.{CHOICE} {chosen}" if chosen else ""
    return source.error(name, f"is no setting{of}; there are {', '.join(siblings)}")


def _value(value: Given, kind: Kind, name: str, source: SettingSource) -> Setting:
    match kind:
        case Section() | Named() | Chosen() | ScalarTable():
            if value is None:  # `train:` with everything below it commented out
                return {}
            if not isinstance(value, Mapping):
                raise source.error(name, f"is {_shown(value)}; it is a section, with settings of its own below it")
            return partial(value, kind, source, f"{name}.")
        case SectionList():
            return _items(value, kind, name, source)
        case Values(item):
            if not isinstance(value, (list, tuple)):
                raise source.error(name, f"is {_shown(value)}; it must be a list")
            return tuple(_scalar(v, item, f"{name}.{i}", source) for i, v in enumerate(value))
        case Scalar():
            return _scalar(value, kind, name, source)


def _items(value: Given, kind: SectionList, name: str, source: SettingSource) -> Setting:
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
    # A file's values have types already: 1.5 for a whole number, or true for a number, is a mistake and no conversion.
    converted = _from_text(value, kind.type) if source.text else _from_data(value, kind.type)
    if converted is None:
        hint = "; put it in quotes" if kind.type is str and not isinstance(value, (list, dict)) else ""
        raise source.error(name, f"is {_shown(value)}; it must be {_WANTED[kind.type]}{hint}")
    if isinstance(converted, float) and not math.isfinite(converted):
        raise source.error(name, f"is {_shown(value)}; it must be a finite number")
    return converted


def _from_text(value: Given, kind: type) -> bool | int | float | str | None:
    """A command line's text as `kind`, or None. A switch without a value is already a bool."""
    if kind is bool:  # bool("false") would be true
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
    # By the exact type: to Python true is a whole number too.
    return cast("bool | int | float | str", value) if type(value) is kind else None


def _shown(value: Given) -> str:
    text = repr(value)  # in quotes and escaped: it may hold anything, and the message is one line
    text = text if len(text) <= 60 else text[:57] + "..."
    return text if isinstance(value, str) else f"{text} ({type(value).__name__})"
