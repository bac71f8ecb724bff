"""What `--help` of a command with settings shows: every option with the value that it has now, laid out by tyro."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, make_dataclass
from typing import TypeVar

from megatron_gemini.config.run import RunConfig
from megatron_gemini.config.schema import Chosen, Named, Section, kinds

_DESCRIPTION = """Train a model. Values come from the defaults, a preset, the file and the options, each over the last.

Lists of sections (data.sources, data.validation, data.curriculum, init_from) are written in the file;
--data.sources.0.weight changes an item."""
Settings = TypeVar("Settings")
_CHECKED = {"__post_init__": lambda self: None}
"""Of a class whose values have been checked."""


@dataclass(frozen=True)
class CommandLine(RunConfig):
    """What stands beside the sections."""

    config: str = ""
    """YAML file with the sections below; its values become the defaults shown here."""
    preset: str = ""
    """Named model whose values come before the file's. The file may name it instead, as `preset: NAME`."""
    debug: bool = False
    """Show the traceback of a mistake in the settings or the data."""


def print_help(config: RunConfig, path: str, preset: str, prog: str) -> None:
    """Print the options and leave with status 0. path, preset: as they were given."""
    import tyro

    sections = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    shown = fixed(CommandLine(**sections, config=path, preset=preset))
    tyro.cli(type(shown), args=["--help"], default=shown, prog=prog, description=_DESCRIPTION, use_underscores=True)


def fixed(section: Settings) -> Settings:
    """The section as an instance of a dataclass without `Named` and `Chosen` kinds, which tyro could not lay out.

    Fields keep their descriptions, which tyro reads from the class that is the new one's base.
    """
    assert dataclasses.is_dataclass(section) and not isinstance(section, type)
    values: dict[str, object] = {}
    for name, kind in kinds(type(section)).items():
        value = getattr(section, name)
        match kind:
            case Section() | Chosen():
                values[name] = fixed(value)
            case Named():
                values[name] = _as_section(name, value)
            case _:
                continue
    if not values:
        return section
    fields = [(name, type(value), dataclasses.field(default=value)) for name, value in values.items()]
    shown = make_dataclass(type(section).__name__, fields, bases=(type(section),), namespace=_CHECKED, frozen=True)
    rest = {f.name: getattr(section, f.name) for f in dataclasses.fields(section)} | values
    return shown(**rest)


def _as_section(name: str, sections: Mapping[str, object]) -> object:
    values = {each: fixed(section) for each, section in sections.items()}
    fields = [(each, type(value), dataclasses.field(default=value)) for each, value in values.items()]
    return make_dataclass(name, fields, frozen=True)(**values)
