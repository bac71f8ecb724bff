"""From plain mappings (YAML, command line) to the types of the sections, with errors that name the setting.

Every source of settings is first checked on its own into a *partial*: a nested dict that has the shape of `RunConfig`,
holds only what the source sets, and only values of the right type. Partials merge; the sections are built once, from
the merged whole, so that a check between two settings never sees a half-way state.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints


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


def partial(mapping: Mapping[Any, Any], section: type, source: SettingSource, prefix: str = "") -> dict[str, Any]:
    """Check a mapping against the dataclass `section`, whose settings are called `prefix` + field name.

    Raises a `ValueError` on an unknown name (with the nearest valid one) or a value of another type.
    """
    types = field_types(section)
    values = {}
    for key, value in mapping.items():
        name = f"{prefix}{key}"
        if key not in types:
            raise unknown(name, [prefix + known for known in types], source)
        values[key] = _value(value, types[key], name, source)
    return values


def merge(base: Any, over: Any, name: str = "") -> Any:
    """`base` with the settings of `over` put on top; a list is replaced, or changed in the items that `over` numbers.

    Raises a `ValueError` for the number of an item that the list does not have.
    """
    if not isinstance(over, dict) or base is None:
        return over
    merged = dict(base) if isinstance(base, dict) else dict(enumerate(base))
    for key, value in over.items():
        dotted = f"{name}.{key}" if name else str(key)
        if isinstance(base, list) and key not in merged:
            raise _no_item(dotted, len(base))
        merged[key] = merge(merged.get(key), value, dotted)
    return list(merged.values()) if isinstance(base, list) else merged


def _no_item(name: str, length: int) -> ValueError:
    items = f"has the items 0 to {length - 1}" if length else "is empty"
    return ValueError(f"--{name} does not exist; the list in the file {items}")


def build(section: type, values: Mapping[str, Any], name: str = "") -> Any:
    """An instance of the dataclass `section`; its own checks raise as they are written there."""
    types = field_types(section)
    arguments = {}
    for key, value in values.items():
        item = item_section(types[key])
        dotted = f"{name}.{key}" if name else key
        if dataclasses.is_dataclass(types[key]):
            arguments[key] = build(types[key], value, dotted)
        elif item and isinstance(value, dict):  # items of the command line without a list to belong to
            raise _no_item(f"{dotted}.{next(iter(value))}", 0)
        elif item:
            arguments[key] = tuple(_build_item(item, v, f"{dotted}.{i}") for i, v in enumerate(value))
        else:
            arguments[key] = value
    return section(**arguments)


def _build_item(section: type, values: Mapping[str, Any], name: str) -> Any:
    try:
        return build(section, values, name)
    except ValueError as error:  # a list item does not know its place, and the user needs it
        raise ValueError(f"{name}: {error}") from error


@functools.cache
def field_types(section: type) -> dict[str, Any]:
    """Names and types of the settings of a dataclass."""
    hints = get_type_hints(section)
    return {field.name: hints[field.name] for field in dataclasses.fields(section)}


def item_section(kind: Any) -> type | None:
    """The dataclass of the items of a list of sections, such as data.sources; otherwise None."""
    if get_origin(kind) is tuple and dataclasses.is_dataclass(get_args(kind)[0]):
        return get_args(kind)[0]
    return None


def setting_names(section: type, prefix: str = "") -> list[str]:
    """Dotted names of every setting, without the items of lists."""
    names = []
    for key, kind in field_types(section).items():
        if dataclasses.is_dataclass(kind) and isinstance(kind, type):
            names += setting_names(kind, f"{prefix}{key}.")
        else:
            names.append(prefix + key)
    return names


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


def _value(value: Any, kind: Any, name: str, source: SettingSource) -> Any:
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        if value is None:  # `train:` with everything below it commented out
            return {}
        if not isinstance(value, Mapping):
            raise source.error(name, f"is {_shown(value)}; it is a section, with settings of its own below it")
        return partial(value, kind, source, f"{name}.")
    if item := item_section(kind):
        return _items(value, item, name, source)
    if get_origin(kind) is tuple:
        if not isinstance(value, (list, tuple)):
            raise source.error(name, f"is {_shown(value)}; it must be a list")
        return tuple(_value(v, get_args(kind)[0], f"{name}.{i}", source) for i, v in enumerate(value))
    return _scalar(value, kind, name, source)


def _items(value: Any, item: type, name: str, source: SettingSource) -> Any:
    if isinstance(value, Mapping) and source.text:  # the command line changes items by their number
        return {index: _value(v, item, f"{name}.{index}", source) for index, v in value.items()}
    if source.text:
        raise source.error(name, f"is a list of sections; write it in the file, or set --{name}.0.FIELD of its items")
    if not isinstance(value, (list, tuple)) or not all(isinstance(v, Mapping) for v in value):
        fields = ", ".join(field_types(item))
        raise source.error(name, f"is {_shown(value)}; it must be a list of mappings, each with {fields}")
    return [partial(v, item, source, f"{name}.{index}.") for index, v in enumerate(value)]


_WANTED = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def _scalar(value: Any, kind: Any, name: str, source: SettingSource) -> Any:
    if get_origin(kind) is Literal:
        choices = get_args(kind)
        if value not in choices or isinstance(value, bool):
            raise source.error(name, f"is {_shown(value)}; choose one of {', '.join(choices)}")
        return value
    converted = _from_text(value, kind) if source.text else _from_data(value, kind)
    if converted is None:
        hint = "; put it in quotes" if kind is str and not isinstance(value, (list, dict)) else ""
        raise source.error(name, f"is {_shown(value)}; it must be {_WANTED[kind]}{hint}")
    if kind is float and not math.isfinite(converted):
        raise source.error(name, f"is {_shown(value)}; it must be a finite number")
    return converted


def _from_text(value: Any, kind: type) -> Any:
    """A command line's text as `kind`, or None. A switch without a value is already a bool."""
    if kind is bool:
        return value if isinstance(value, bool) else {"true": True, "false": False}.get(value.lower())
    try:
        return None if isinstance(value, bool) else kind(value)
    except ValueError:
        return None


def _from_data(value: Any, kind: type) -> Any:
    """A YAML value as `kind`, or None. PyYAML reads 1e-3 (no dot) as text, which is a number to everyone else."""
    if kind is float and not isinstance(value, bool) and isinstance(value, (int, float, str)):
        try:
            return float(value)
        except (ValueError, OverflowError):
            return None
    return value if type(value) is kind else None


def _shown(value: Any) -> str:
    text = repr(value)
    text = text if len(text) <= 60 else text[:57] + "..."
    return text if isinstance(value, str) else f"{text} ({type(value).__name__})"
