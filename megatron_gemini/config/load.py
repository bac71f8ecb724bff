"""One `RunConfig` from a YAML file and the command line.

Values come, each over the one before, from the defaults, a preset, the file and the options `--section.field value`.
Options are read here by the same rules as the file, so that both give the same errors; tyro lays out `--help`.
Nothing is taken from the environment and nothing in a value is expanded, so a saved configuration holds no secrets.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeAlias, cast

from megatron_gemini.config.convert import Given, Partial, SettingSource, build, merge, partial
from megatron_gemini.config.help import print_help
from megatron_gemini.config.options import read_options
from megatron_gemini.config.run import RunConfig
from megatron_gemini.config.schema import Plain, Section, setting_names
from megatron_gemini.config.yaml_file import read_yaml

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
    options = read_options(argv, RunConfig)
    document = read_yaml(options.config) if options.config else {}
    named = document.pop("preset", None)
    name = options.preset or named
    values = _preset_values(name, presets) if name is not None else {}
    values = cast("Partial", merge(values, _checked(document, f"{options.config}: ")))
    config = build(RunConfig, cast("Partial", merge(values, options.settings)))
    if options.help:
        print_help(config, options.config or "", str(name or ""), prog)
    return config


def read_config(path: str | Path) -> RunConfig:
    """The configuration in a file that `dump_config` wrote, such as a checkpoint's config.yaml."""
    return config_from_dict(read_yaml(path), str(path))


def config_from_dict(values: Mapping[str, Given], origin: str = "configuration") -> RunConfig:
    """The configuration of nested plain data, {section: {field: value}}; what it does not name has its default.

    Raises a `ValueError` that begins with `origin` and names the setting.
    """
    return build(RunConfig, _checked(values, f"{origin}: "))


def dump_config(config: RunConfig) -> str:
    """The whole configuration as YAML; `read_config` of it gives an equal one."""
    import yaml

    # Escaped to ASCII: written as they are, some characters (U+0085) would come back as spaces.
    return yaml.safe_dump(_plain(dataclasses.asdict(config)), sort_keys=False, width=120)


def _checked(values: Mapping[str, Given], label: str) -> Partial:
    root = Section(RunConfig)
    return partial(values, root, SettingSource(label, names=tuple(setting_names(root))))


def _preset_values(name: Plain, presets: Presets | None) -> Partial:
    if not isinstance(name, str):
        raise ValueError(f"preset is {name!r}; it must be the name of a preset")
    if presets is None:
        raise ValueError(f"preset is {name!r}, and this command has no presets; write the sections out")
    return _checked(presets(name), f"preset {name}: ")


def _plain(value: Given) -> Plain:
    """Tuples as lists: YAML has no others."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else cast("Plain", value)
