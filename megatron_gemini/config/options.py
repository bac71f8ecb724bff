"""Reading the command line: `--section.field value`, and the few options that are no settings."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import cast

from megatron_gemini.config.convert import Given, Partial, SettingSource, merge, partial, unknown
from megatron_gemini.config.schema import Kind, Scalar, Section, Values, below, names_below, setting_names

_ALIASES = {"deepspeed_config": "engine.deepspeed_config"}  # the name that DeepSpeed's users know
_IGNORED = {"local_rank": True, "deepspeed": False, "debug": False}  # and whether a value follows


@dataclass
class Options:
    """A command line, read."""

    config: str | None = None
    preset: str | None = None
    help: bool = False
    settings: Partial = field(default_factory=dict)
    """A partial of `convert`."""


def read_options(argv: list[str], section: type) -> Options:
    """Read options against the dataclass `section`. Of a repeated option the last counts, as wrapper scripts expect.

    Raises a `ValueError` that names the option.
    """
    options, root = Options(), Section(section)
    source = SettingSource("--", text=True, names=("config", "preset", *setting_names(root)))
    for name, values in _split(argv):
        if name == "help":
            options.help = True
        elif name in ("config", "preset"):
            setattr(options, name, _single(name, values))
        else:
            path, value = _setting(_ALIASES.get(name, name), values, root, source)
            for part in reversed(path):
                value = {part: value}
            assert isinstance(value, dict)
            options.settings = cast("Partial", merge(options.settings, partial(value, root, source)))
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


def _setting(name: str, values: list[str], root: Kind, source: SettingSource) -> tuple[list[str], Given]:
    """The path of a setting (with numbers for list items) and its value, still text where it is no switch."""
    path = name.split(".")
    kind = _kind(path, root)
    positive = [*path[:-1], path[-1].removeprefix("no_")]
    if kind is None and not values and _kind(positive, root) == Scalar(bool):
        return positive, False
    if kind is None:
        raise unknown(name, _siblings(path, root), source)
    if kind == Scalar(bool) and not values:
        return path, True
    if isinstance(kind, Values):
        return path, values
    if not isinstance(kind, Scalar):  # `partial` says what is wrong with it
        return path, " ".join(values)
    if len(values) != 1:
        raise ValueError(f"--{name} takes one value and got {' '.join(map(repr, values)) or 'none'}")
    return path, values[0]


def _kind(path: list[str], root: Kind) -> Kind | None:
    """The kind of the setting at `path`, or None where there is none."""
    kind: Kind | None = root
    for part in path:
        kind = None if kind is None else below(kind, part)
    return kind


def _siblings(path: list[str], root: Kind) -> list[str]:
    """What there is in the innermost section of `path` that exists."""
    for end in reversed(range(len(path))):
        kind = _kind(path[:end], root)
        if kind is not None and names_below(kind):
            return [".".join([*path[:end], name]) for name in names_below(kind)]
    return []
