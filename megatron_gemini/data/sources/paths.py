"""Where shards lie: local paths and object stores, by name, glob, {000..015} range or {a,b} list; never a program."""

from __future__ import annotations

import difflib
import glob
import itertools
import os
import re
import stat
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, cast

from megatron_gemini.data.sources.storage import MISTAKES, STRANGE_NAMES, is_url, patiently

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

_BRACES = re.compile(r"\{(\d+\.\.\d+|[^{}]*,[^{}]*)\}")
_MAX_SHARDS = 1_000_000  # a range such as {0..999999999} would otherwise take all memory before anything is looked for


def open_binary(path: str) -> BinaryIO:
    """A local file or an object of a store, to read from. Raises OSError; ValueError where a store's client is absent.

    The clients of stores are fsspec's: `pip install s3fs` for s3, gcsfs for gs, adlfs for az.
    """
    if not is_url(path):
        return open(path, "rb")
    file_system, name = _store(path)
    return cast("BinaryIO", file_system.open(name, "rb"))


def expand_shards(pattern: str) -> list[str]:
    """Paths of the shards, sorted: globs are matched, {000..015} counts with the width of its first number, {a,b} is a
    or b.

    Raises ValueError when nothing matches, naming the nearest files that exist, and when a counted shard is missing;
    DataUnreachable for storage that does not answer.
    """
    if not pattern:
        raise ValueError("a data source has no shards; set its `shards` to a path such as data/train-{000..015}.tar")
    paths: list[str] = []
    for name in _expand_braces(pattern):
        if is_url(name):
            _store(name)  # a client that is not installed is not waited for
        found = patiently(partial(_matches, name), name, MISTAKES)
        if not found:
            raise ValueError(f"no shard matches {name!r}{'' if is_url(name) else _nearest(name)}")
        paths += found
    return sorted(dict.fromkeys(paths))


def _matches(name: str) -> list[str]:
    """What there is of a name or glob, sorted. Raises OSError, or an error of a store's client."""
    if is_url(name):
        file_system, place = _store(name)
        there = file_system.glob(place) if glob.has_magic(place) else [place] if file_system.isfile(place) else []
        return sorted(f"{name.partition('://')[0]}://{path.lstrip('/')}" for path in there)
    if glob.has_magic(name):
        return sorted(glob.glob(name))
    # Not os.path.isfile, to which storage that fails is a file that is not there.
    try:
        return [name] if stat.S_ISREG(os.stat(name).st_mode) else []
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        if error.errno in STRANGE_NAMES:
            return []
        raise


def _store(url: str) -> tuple[AbstractFileSystem, str]:
    import fsspec

    try:
        return cast("tuple[AbstractFileSystem, str]", fsspec.core.url_to_fs(url))
    except ImportError as error:
        raise ValueError(f"{url!r} needs a client that is not installed: {error}") from None


def _expand_braces(pattern: str) -> list[str]:
    parts = _BRACES.split(pattern)  # text, inside of braces, text, ..., text
    choices: list[Sequence[str]] = [[parts[0]]]
    total = 1
    for inside, text in zip(parts[1::2], parts[2::2], strict=True):
        first, dots, last = inside.partition("..")
        counted = bool(dots) and "," not in inside
        # The product is known before any name is made.
        count = int(last) - int(first) + 1 if counted else inside.count(",") + 1
        total *= max(count, 0)
        if not 0 < total <= _MAX_SHARDS:
            raise ValueError(f"the range {{{inside}}} of {pattern!r} gives {total:,} shards; write {{000..015}}")
        if counted:
            choices.append([f"{number:0{len(first)}d}{text}" for number in range(int(first), int(last) + 1)])
        else:
            choices.append([choice + text for choice in inside.split(",")])
    return ["".join(choice) for choice in itertools.product(*choices)]


def _nearest(name: str) -> str:
    """What exists that the user may have meant, as the end of an error message."""
    if os.path.isdir(name):
        return f"; it is a folder: write {name.rstrip('/')}/* for the files in it"
    folder = Path(name).parent
    while not folder.is_dir():
        if "*" not in folder.name and "?" not in folder.name:
            return f"; the folder {str(folder)!r} does not exist (paths are relative to {os.getcwd()!r})"
        folder = folder.parent
    ending = Path(name).suffix or ".tar"
    # Of a folder with millions of files not all are read for the end of an error message.
    names = sorted(entry.name for entry in itertools.islice(folder.iterdir(), 10_000) if entry.suffix == ending)
    near = difflib.get_close_matches(Path(name).name, names, n=3, cutoff=0.3) or names[:3]
    if not near:
        return f"; the folder {str(folder)!r} holds no {ending} files"
    return f"; the nearest that exist: {', '.join(str(folder / found) for found in near)}"
