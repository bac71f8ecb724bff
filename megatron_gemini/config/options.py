"""Reading the command line: `--section.field value`, and the few options that are no settings."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, is_dataclass
from typing import Any, get_origin

from megatron_gemini.config.convert import (
    SettingSource,
    field_types,
    item_section,
    merge,
    partial,
    setting_names,
    unknown,
)

_ALIASES = {"deepspeed_config": "engine.deepspeed_config"}  # the name that DeepSpeed's users know
_IGNORED = {"local_rank": True, "deepspeed": False, "debug": False}  # and whether a value follows


@dataclass
class Options:
    """A command line, read."""

    config: str | None = None
    preset: str | None = None
    help: bool = False
    settings: dict[str, Any] = field(default_factory=dict)
    """A partial of `convert`."""


def read_options(argv: list[str], section: type) -> Options:
    """Read options against the dataclass `section`. Of a repeated option the last counts, as wrapper scripts expect.

    Raises a `ValueError` that names the option.
    """
    options = Options()
    source = SettingSource("--", text=True, names=("config", "preset", *setting_names(section)))
    for name, values in _split(argv):
        if name == "help":
            options.help = True
        elif name in ("config", "preset"):
            setattr(options, name, _single(name, values))
        else:
            path, value = _setting(_ALIASES.get(name, name), values, section, source)
            for part in reversed(path):
                value = {part: value}
            options.settings = merge(options.settings, partial(value, section, source))
    return options


def _split(argv: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Pairs of an option's name, with underscores and without dashes, and the values after it."""
    tokens = ["--help" if token == "-h" else token for token in argv]
    while tokens:
        token = tokens.pop(0)
        if not token.startswith("--") or token == "--":
            raise ValueError(f"{token!r} stands alone; settings are written --section.field value")
        name, equals, inline = token[2:].partition("=")
        values = [inline] if equals else []
        while not equals and tokens and not tokens[0].startswith("--"):
            values.append(tokens.pop(0))
        name = name.replace("-", "_")
        if name in _IGNORED:
            if len(values) > _IGNORED[name]:
                raise ValueError(f"{values[-1]!r} stands alone; settings are written --section.field value")
            continue
        yield name, values


def _single(name: str, values: list[str]) -> str:
    if len(values) != 1 or not values[0]:
        raise ValueError(f"--{name} takes one value and got {' '.join(map(repr, values)) or 'none'}")
    return values[0]


def _setting(name: str, values: list[str], section: type, source: SettingSource) -> tuple[list[Any], Any]:
    """The path of a setting (with numbers for list items) and its value, still text where it is no switch."""
    path: list[Any] = [int(part) if part.isdecimal() else part for part in name.split(".")]
    kind = _kind(path, section)
    positive = [*path[:-1], str(path[-1]).removeprefix("no_")]
    if kind is None and not values and _kind(positive, section) is bool:
        return positive, False
    if kind is None:
        raise unknown(name, _siblings(path, section), source)
    if kind is bool and not values:
        return path, True
    if is_dataclass(kind) or item_section(kind):  # `partial` says what is wrong with it
        return path, " ".join(values)
    if get_origin(kind) is tuple:
        return path, values
    if len(values) != 1:
        raise ValueError(f"--{name} takes one value and got {' '.join(map(repr, values)) or 'none'}")
    return path, values[0]


def _kind(path: list[Any], section: type) -> Any:
    """The type of the setting at `path`, or None where there is none."""
    kind: Any = section
    for part in path:
        if isinstance(part, int) and item_section(kind):
            kind = item_section(kind)
        else:
            kind = field_types(kind).get(part) if isinstance(kind, type) and is_dataclass(kind) else None
    return kind


def _siblings(path: list[Any], section: type) -> list[str]:
    """What there is in the innermost section of `path` that exists."""
    for end in reversed(range(len(path))):
        kind = _kind(path[:end], section)
        if isinstance(kind, type) and is_dataclass(kind):
            return [".".join(map(str, [*path[:end], name])) for name in field_types(kind)]
    return []
