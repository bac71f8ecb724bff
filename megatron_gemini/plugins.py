"""Modules of users that add modalities, encoders, connectors, objectives and the like, by registering them on import.

A plugin is imported because the person who starts the program says so:

- by `--plugin MODULE` on the command line, which may be repeated;
- by the environment variable MEGATRON_GEMINI_PLUGINS, names between commas;
- by an installed package's entry point in the group `megatron_gemini.plugins`.

A YAML file or a checkpoint never causes an import: it may come from a stranger. A checkpoint records the names, so that
whoever opens it without them is told what to add.
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Iterable, Sequence

VARIABLE = "MEGATRON_GEMINI_PLUGINS"
GROUP = "megatron_gemini.plugins"
SHOWN = 5
"""Names of a checkpoint that a message repeats at most."""
# ASCII, and bounded: `check` repeats names that a stranger may have written to a terminal.
_NAME = re.compile(r"(?=.{1,100}\Z)[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", re.ASCII)
_loaded: list[str] = []


def loaded() -> tuple[str, ...]:
    """Names of the modules that were loaded, in order."""
    return tuple(_loaded)


def start(argv: Sequence[str]) -> list[str]:
    """Load the plugins of a command line, then those of the environment; the options without `--plugin`.

    Raises a ValueError for a plugin that cannot be loaded.
    """
    rest, names = take_options(argv)
    load(names)
    load_installed()
    return rest


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
            # Missing may be the plugin, a package that it is in, or something that it imports: the way out differs.
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise ValueError(f"the plugin {name} needs the module {error.name}, which is not installed") from error
            raise ValueError(
                f"the plugin {name} is not there; install it, or put the folder that holds it into PYTHONPATH"
            ) from error
        except ImportError as error:
            raise ValueError(f"the plugin {name} cannot be imported: {error}") from error
        except ValueError as error:  # such as a name that is taken, which says its own way out
            raise ValueError(f"the plugin {name} cannot be loaded: {error}") from error
        # Whatever else a module may do as it is imported, a call of sys.exit included: it is its author's to mend.
        except (Exception, SystemExit) as error:
            raise ValueError(
                f"the plugin {name} failed while it was imported: {type(error).__name__}: {error}; --debug shows where"
            ) from error
        _loaded.append(name)


def load_installed() -> None:
    """Import what the environment variable and the entry points of installed packages name."""
    from importlib.metadata import entry_points  # here, since a data worker has no use for it

    load(name.strip() for name in os.environ.get(VARIABLE, "").split(",") if name.strip())
    # Sorted: packages are found in the order of folders on the disk, and all ranks must register in the same order.
    load(sorted(point.module for point in entry_points(group=GROUP)))


def take_options(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """(the options without `--plugin MODULE` and `--plugin=MODULE`, the modules).

    Raises a ValueError for a bare `--plugin`.
    """
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
    """Raise a ValueError unless all plugins that a checkpoint recorded are loaded; nothing is imported.

    recorded: may be anything that a stranger wrote. The message repeats no more than `SHOWN` names, and of those only
    such as a module can have.
    """
    missing = [name for name in recorded if name not in _loaded]
    if not missing:
        return
    # By its text, as what a stranger wrote may be a list or a table, which no set takes.
    missing = list({str(name): name for name in missing}.values())
    named = [name for name in missing if isinstance(name, str) and _NAME.fullmatch(name)][:SHOWN]
    if not named:
        raise ValueError(f"{origin} was made with plugins, but records no module's name; it cannot be opened")
    more = f" and {len(missing) - len(named)} more" if len(missing) > len(named) else ""
    options = " ".join(f"--plugin {name}" for name in named)
    raise ValueError(
        f"{origin} was made with the plugins {', '.join(named)}{more}, which are not loaded; if you trust them, add "
        f"{options}"
    )
