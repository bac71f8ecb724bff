"""What `--help` of a command with settings shows: every option with the value that it has now, laid out by tyro."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, make_dataclass
from typing import Annotated, NamedTuple, cast

from megatron_gemini.config.run import RunConfig
from megatron_gemini.config.schema import (
    CHOICE,
    Chosen,
    Named,
    Scalar,
    ScalarTable,
    Section,
    SectionList,
    SectionValue,
    SettingValue,
    Values,
    kinds,
)

_DESCRIPTION = """Train a model. Values come from the defaults, a preset, the file and the options, each over the last.

Lists of sections (data.sources, data.validation, data.curriculum, init_from) are written in the file;
--data.sources.0.weight changes an item."""

# tyro looks for the source of every class in the file of its module. By default that would be the long types.py, and
# `--help` took twice the time.
_NOWHERE = "megatron_gemini"


@dataclass(frozen=True)
class CommandLine(RunConfig):
    """What stands beside the sections."""

    config: str = ""
    """YAML file with the sections below; its values become the defaults shown here."""
    preset: str = ""
    """Named model whose values come before the file's. The file may name it instead, as `preset: NAME`."""
    plugin: str = ""
    """Module that adds encoders, connectors, objectives and the like; may be given several times. Its settings are
    shown here."""
    debug: bool = False
    """Show the traceback of a mistake in the settings or the data."""


class Shown(NamedTuple):
    """A field as tyro gets it."""

    hint: type
    value: SettingValue


def print_help(config: RunConfig, path: str, preset: str, plugins: str, prog: str) -> None:
    """Print the options and leave with status 0. path, preset, plugins: as they were given."""
    import tyro

    sections = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    shown = laid_out(CommandLine(**sections, config=path, preset=preset, plugin=plugins))
    tyro.cli(type(shown), args=["--help"], default=shown, prog=prog, description=_DESCRIPTION, use_underscores=True)


def laid_out(section: SectionValue, choices: tuple[str, ...] = ()) -> SectionValue:
    """The section as an instance of a dataclass without `Named`, `Chosen` and `ScalarTable` kinds, which tyro has not.

    Fields keep their descriptions, which tyro reads from the class that is the new one's base. choices: of its `kind`.
    """
    fields: dict[str, Shown] = {}
    if choices:  # its type is text, as a plugin may add others
        fields[CHOICE] = Shown(_text(f"{{{','.join(choices)}}}"), getattr(section, CHOICE))
    for name, kind in kinds(type(section)).items():
        value = getattr(section, name)
        match kind:
            case Section() | Chosen():
                inner = laid_out(value, kind.registry.names if isinstance(kind, Chosen) else ())
                fields[name] = Shown(type(inner), inner)
            case Named():
                inner = _sections(name, value)
                fields[name] = Shown(type(inner), inner)
            case SectionList() if value:
                items = tuple(laid_out(item) for item in value)
                fields[name] = Shown(cast("type", tuple[tuple(map(type, items))]), items)  # type: ignore[misc]
            case ScalarTable(item):  # one option for every name that the user may choose
                words = {key: " ".join(each) if isinstance(each, tuple) else str(each) for key, each in value.items()}
                now = ", ".join(f"{key} {text}" for key, text in words.items()) or "none"
                fields[name] = Shown(_text(_metavar(item), f"{name}.NAME"), now)
    return _derived(section, fields) if fields else section


def _sections(name: str, sections: Mapping[str, SectionValue]) -> SectionValue:
    """A `Named` kind as one section."""
    inner = {each: laid_out(section) for each, section in sections.items()}
    fields = [(each, type(value), dataclasses.field(default=value)) for each, value in inner.items()]
    return make_dataclass(name, fields, frozen=True, namespace={"__module__": _NOWHERE})()


def _derived(section: SectionValue, fields: Mapping[str, Shown]) -> SectionValue:
    """The section with other types and values of some fields, and without its checks, which it has passed."""
    base = type(section)
    written = (base.__doc__ or "").startswith(f"{base.__name__}(")  # by `dataclass`, where there is no docstring
    # The base's docstring is given on, since tyro shows it above the options; a derived class would have none.
    namespace = {"__post_init__": lambda self: None, "__doc__": "" if written else base.__doc__, "__module__": _NOWHERE}
    changed = [(name, each.hint, dataclasses.field(default=each.value)) for name, each in fields.items()]
    shown = make_dataclass(base.__name__, changed, bases=(base,), namespace=namespace, frozen=True)
    values = {each.name: getattr(section, each.name) for each in dataclasses.fields(section)}
    return shown(**values | {name: each.value for name, each in fields.items()})


def _text(metavar: str, name: str | None = None) -> type:
    """The type of a text that is shown with `metavar` for its value, and by another name."""
    from tyro.conf import arg

    return cast("type", Annotated[str, arg(name=name, metavar=metavar)])


def _metavar(item: Scalar | Values) -> str:
    scalar = item.item if isinstance(item, Values) else item
    return scalar.type.__name__.upper() + (" ..." if isinstance(item, Values) else "")
