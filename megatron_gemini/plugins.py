"""Modules of users that add modalities, encoders, connectors, objectives and the like, by registering them on import.

A plugin is imported because the person who starts the program says so: by `--plugin MODULE` on the command line, by the
environment variable MEGATRON_GEMINI_PLUGINS (names between commas), or by an installed package's entry point in the
group `megatron_gemini.plugins`. A YAML file or a checkpoint never causes an import: it may come from a stranger. A
checkpoint records the names, so that one which lacks them can say what to add.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import re
from collections.abc import Iterable, Sequence

VARIABLE = "MEGATRON_GEMINI_PLUGINS"
GROUP = "megatron_gemini.plugins"
_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
_loaded: list[str] = []


def loaded() -> tuple[str, ...]:
    """Names of the modules that were loaded, in order."""
    return tuple(_loaded)


def load(names: Iterable[str]) -> None:
    """Import the modules, each once. Raises a ValueError for one that is not there or cannot be imported."""
    for name in names:
        if name in _loaded:
            continue
        if not _NAME.fullmatch(name):
            raise ValueError(
                f"the plugin {name!r} is no module's name; write it as in an import, such as package.module"
            )
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise ValueError(f"the plugin {name} needs the module {error.name}, which is not installed") from error
            raise ValueError(
                f"the plugin {name} is not there; install it, or put the folder that holds it into PYTHONPATH"
            ) from error
        _loaded.append(name)


def load_installed() -> None:
    """Import what the environment variable and the entry points of installed packages name."""
    load(name.strip() for name in os.environ.get(VARIABLE, "").split(",") if name.strip())
    load(point.module for point in importlib.metadata.entry_points(group=GROUP))


def take_options(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """(the options without `--plugin MODULE` and `--plugin=MODULE`, the modules). Raises a ValueError for a bare
    one."""
    rest, names = [], []
    words = iter(argv)
    for word in words:
        option, equals, inline = word.partition("=")
        if option != "--plugin":
            rest.append(word)
            continue
        name = inline if equals else next(words, "")
        if not name or name.startswith("-"):
            raise ValueError("--plugin takes the name of a module, such as --plugin package.module")
        names.append(name)
    return rest, names


def check(recorded: Sequence[str], origin: str) -> None:
    """Raise a ValueError unless all plugins that a checkpoint recorded are loaded."""
    missing = [name for name in recorded if name not in _loaded]
    if missing:
        options = " ".join(f"--plugin {name}" for name in missing)
        raise ValueError(
            f"{origin} was made with the plugin{'s' if len(missing) > 1 else ''} {', '.join(missing)}, which "
            f"{'are' if len(missing) > 1 else 'is'} not loaded; if you trust them, add {options}"
        )
