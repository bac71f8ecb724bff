"""One `RunConfig` from a YAML file and the command line.

Values come, each over the one before, from the defaults, a preset, the file and the options `--section.field value`.
Options are read here by the same rules as the file, so that both give the same errors; tyro lays out `--help`.
Nothing is taken from the environment and nothing in a value is expanded, so a saved configuration holds no secrets.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias, cast

from megatron_gemini import plugins
from megatron_gemini.config.build import Partial, build, merge
from megatron_gemini.config.convert import SettingSource, choices, partial
from megatron_gemini.config.help import print_help
from megatron_gemini.config.options import NO_SETTINGS, option_settings, split_options
from megatron_gemini.config.run import RunConfig
from megatron_gemini.config.schema import Choices, Given, Plain, Section, setting_names
from megatron_gemini.config.yaml_file import read_yaml

ROOT = Section(RunConfig)
Presets: TypeAlias = Callable[[str], Mapping[str, Given]]
"""Gives a preset's settings by its name, nested as in a file."""


def load_config(argv: list[str], presets: Presets | None = None, prog: str = "megatron-gemini train") -> RunConfig:
    """The configuration that a command line asks for.

    argv: without the program's name. `--config FILE`, `--preset NAME`, `--section.field value` (or `=value`),
        `--section.flag` and `--section.no_flag`; `-` and `_` are the same in names. What launchers add
        (`--local_rank N`, `--deepspeed`) is ignored; `--deepspeed_config FILE` is `--engine.deepspeed_config FILE`.
    presets: gives a preset's values, {section: {field: value}}, and raises a `ValueError` for an unknown name.

    Raises a `ValueError` that names the setting and the way out. `--help` prints and raises `SystemExit(0)`.
    """
    options = split_options(argv)
    document = read_yaml(options.config) if options.config else {}
    named = document.pop("preset", None)  # no setting: what it gave is in the configuration that a run saves
    name = options.preset or named
    given: list[tuple[Mapping[str, Given], SettingSource]] = []
    if name is not None:
        given.append((_preset_values(name, presets), SettingSource(f"preset {name}: ")))
    given.append((document, SettingSource(f"{options.config}: ")))
    line = SettingSource("--", text=True)
    # The kinds of sections first, from all sources: a file's settings may belong to a kind that an option chooses.
    chosen = choices([*given, (options.kinds(), line)], ROOT)
    values = _merged(given, chosen)
    names = (*NO_SETTINGS, *setting_names(ROOT, chosen))
    settings = option_settings(options, ROOT, dataclasses.replace(line, choices=chosen, names=names))
    config = build(RunConfig, cast("Partial", merge(values, settings)))
    if options.help:  # last, so that it shows the values that this command line has, and its mistakes are told
        print_help(config, options.config or "", str(name or ""), " ".join(plugins.loaded()), prog)
    return config


def read_config(path: str | Path) -> RunConfig:
    """The configuration in a file that `dump_config` wrote, such as a checkpoint's config.yaml.

    An encoder that the file does not name is one of a plugin that was not there. Its section is there, not enabled.
    """
    values = read_yaml(path)
    config = config_from_dict(values, str(path))
    written = values.get("encoders")  # as read, since the configuration has all that are registered
    if not isinstance(written, Mapping):
        return config
    # A plugin that is always installed would otherwise add its encoder to the model of every older checkpoint.
    absent = [name for name in config.encoders if name not in written]
    off = {name: dataclasses.replace(config.encoders[name], enabled=False) for name in absent}
    return dataclasses.replace(config, encoders={**config.encoders, **off})


def config_from_dict(values: Mapping[str, Given], origin: str = "configuration") -> RunConfig:
    """The configuration of nested plain data, {section: {field: value}}; what it does not name has its default.

    Raises a `ValueError` that begins with `origin` and names the setting.
    """
    given = [(values, SettingSource(f"{origin}: "))]
    return build(RunConfig, _merged(given, choices(given, ROOT)))


def dump_config(config: RunConfig) -> str:
    """The whole configuration as YAML; `read_config` of it gives an equal one."""
    import yaml

    # Escaped to ASCII: written as they are, some characters (U+0085) would come back as spaces.
    return yaml.safe_dump(_plain(dataclasses.asdict(config)), sort_keys=False, width=120)


def _merged(given: Sequence[tuple[Mapping[str, Given], SettingSource]], chosen: Choices) -> Partial:
    """The settings of several files and mappings, each over the one before, checked."""
    values: Partial = {}
    names = tuple(setting_names(ROOT, chosen))
    for mapping, source in given:
        checked = partial(mapping, ROOT, dataclasses.replace(source, choices=chosen, names=names))
        values = cast("Partial", merge(values, checked))
    return values


def _preset_values(name: Plain, presets: Presets | None) -> Mapping[str, Given]:
    if not isinstance(name, str):
        raise ValueError(f"preset is {name!r}; it must be the name of a preset")
    if presets is None:
        raise ValueError(f"preset is {name!r}, and this command has no presets; write the sections out")
    return presets(name)


def _plain(value: Given) -> Plain:
    """Tuples as lists: YAML has no others."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else cast("Plain", value)
