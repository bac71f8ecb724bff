"""Reading the command line: `--section.field value`, and the few options that are no settings."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import cast

from megatron_gemini.config.build import Partial, merge
from megatron_gemini.config.convert import SettingSource, partial, unknown
from megatron_gemini.config.schema import (
    CHOICE,
    Choices,
    Given,
    Kind,
    Named,
    Scalar,
    Values,
    below,
    names_below,
    settled,
)

_ALIASES = {"deepspeed_config": "engine.deepspeed_config"}  # the name that DeepSpeed's users know
_IGNORED = {"local_rank": True, "deepspeed": False, "debug": False}  # and whether a value follows
NO_SETTINGS = ("config", "preset", "plugin")
"""Options to suggest beside the settings' names."""


@dataclass
class Options:
    """A command line, split but not yet checked. given: names of settings, and the words after each."""

    config: str | None = None
    preset: str | None = None
    help: bool = False
    given: list[tuple[str, list[str]]] = field(default_factory=list)

    def kinds(self) -> dict[str, Given]:
        """What the settings called `kind` are set to, nested as in a file, for `convert.choices`."""
        tree: dict[str, Given] = {}
        decided = [(name, values[0]) for name, values in self.given if name.endswith(f".{CHOICE}") and len(values) == 1]
        for name, choice in decided:
            node: Given = tree
            *path, last = name.split(".")
            for part in path:
                node = node.setdefault(part, {}) if isinstance(node, dict) else None
            if isinstance(node, dict):  # and not below another `kind`, which `option_settings` refuses
                node[last] = choice
        return tree


def split_options(argv: list[str]) -> Options:
    """The options of a command line. Of a repeated one the last counts, as wrapper scripts expect.

    Raises a `ValueError` that names the option.
    """
    options = Options()
    for name, values in _split(argv):
        if name == "help":
            options.help = True
        elif name in ("config", "preset"):
            setattr(options, name, _single(name, [value for value in values if value]))
        else:
            options.given.append((_ALIASES.get(name, name), values))
    return options


def option_settings(options: Options, root: Kind, source: SettingSource) -> Partial:
    """The settings among the options, a partial of `convert`. Raises a `ValueError` that names the option."""
    settings: Partial = {}
    for name, values in options.given:
        path, value = _setting(name, values, root, source)
        for part in reversed(path):
            value = {part: value}
        assert isinstance(value, dict)
        settings = cast("Partial", merge(settings, partial(value, root, source)))
    return settings


def _split(argv: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Pairs of an option's name, with underscores and without dashes, and the values after it."""
    # Not argparse: it would have to know the settings, some of which are there only once a file has been read.
    tokens = ["--help" if token == "-h" else token for token in argv]
    while tokens:
        token = tokens.pop(0)
        if not token.startswith("--") or token == "--":
            raise ValueError(f"{token!r} stands alone; settings are written --section.field value")
        name, equals, inline = token[2:].partition("=")
        values = [inline] if equals else []
        # A value may begin with one dash: it is a negative number. What begins with two is the next option.
        while not equals and tokens and not tokens[0].startswith("--"):
            values.append(tokens.pop(0))
        name = name.replace("-", "_")
        # DeepSpeed's launcher adds --local_rank to every rank's command line, and old scripts --deepspeed.
        if name in _IGNORED:
            if len(values) > _IGNORED[name]:
                raise ValueError(f"{values[-1]!r} stands alone; settings are written --section.field value")
            continue
        yield name, values


def _single(name: str, values: list[str]) -> str:
    if len(values) != 1:
        raise ValueError(f"--{name} takes one value and got {' '.join(map(repr, values)) or 'none'}")
    return values[0]


def _setting(name: str, values: list[str], root: Kind, source: SettingSource) -> tuple[list[str], Given]:
    """The path of a setting (with numbers for list items) and its value, still text where it is no switch."""
    path = name.split(".")
    kind = _kind(path, root, source.choices)
    positive = [*path[:-1], path[-1].removeprefix("no_")]
    if kind is None and not values and _kind(positive, root, source.choices) == Scalar(bool):
        return positive, False
    if kind is None:
        raise _unknown(path, root, source)
    if kind == Scalar(bool) and not values:
        return path, True
    if isinstance(kind, Values):
        return path, cast("Given", values)
    if not isinstance(kind, Scalar):  # `partial` says what is wrong with it
        return path, " ".join(values)
    return path, _single(name, values)


def _kind(path: list[str], root: Kind, choices: Choices) -> Kind | None:
    """The settled kind of the setting at `path`, or None where there is none."""
    kind: Kind | None = root
    for end, part in enumerate(path, 1):
        kind = None if kind is None else below(kind, part)
        kind = None if kind is None else settled(kind, ".".join(path[:end]), choices)
    return kind


def _unknown(path: list[str], root: Kind, source: SettingSource) -> ValueError:
    """The error for a path that leads nowhere, from the innermost section of it that exists."""
    for end in reversed(range(len(path))):
        parent = _kind(path[:end], root, source.choices)
        if parent is not None and names_below(parent):
            # Of an encoder that is not there, the encoder's name is the mistake, and not the setting behind it.
            return unknown(".".join(path[: end + 1] if isinstance(parent, Named) else path), parent, source)
    raise AssertionError("the root has settings")
