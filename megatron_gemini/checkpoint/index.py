"""The index of a checkpoint: what makes a directory complete, and says whose it is and what it holds.

It is written last. It has a hash of itself, so that no bit of it can change unseen.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from megatron_gemini.checkpoint.blocks import DIGITS, DamagedError, Entry, block_count, hash_file
from megatron_gemini.config.schema import Plain

INDEX = "index.json"
FORMAT = 3  # of the index, the pieces and the state together
MAX_BYTES = 1 << 28  # a file of every one of 100,000 ranks; an index may be a stranger's
_KEYS = {"format", "run", "parent", "serial", "files", "sha256"}


@dataclass(frozen=True)
class RunId:
    """id: random, of one start of a run. parent: of the start that it went on from; empty if it began anew."""

    id: str = field(default_factory=lambda: secrets.token_hex(16))
    parent: str = ""


@dataclass(frozen=True)
class Index:
    """run: who saved. serial: counts what was saved into one folder. files: all of the directory, by their names."""

    run: RunId
    serial: int
    files: Mapping[str, Entry]


def file_hash(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's content."""
    with path.open("rb") as file:  # block by block: a file may be larger than the memory
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write and flush to the disk."""
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def telling(path: Path) -> Iterator[None]:
    """A full disk, or a folder that is read-only, as a ValueError: a traceback explains neither."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror or error}") from error


def replace_text(path: Path, text: str) -> None:
    """Write beside and rename: a reader finds the old text or the new one, never an empty file."""
    beside = path.with_name(f".{path.name}.tmp")
    beside.unlink(missing_ok=True)  # a link there would lead the text to another file
    write_text(beside, text)
    os.replace(beside, path)


def flush_directory(directory: Path) -> None:
    """Flush the names in a directory to the disk: a file that was flushed may still lack its name after a crash."""
    file = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(file)
    except OSError as error:  # some network file systems know nothing like it
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(file)


def seal(
    directory: Path, run: RunId | None = None, serial: int = 1, entries: Mapping[str, Entry] | None = None
) -> None:
    """Write the index that makes a directory complete.

    entries: of files that have been flushed, by those who wrote them. The others are read, and flushed, here.
    """
    found = dict(entries or {})
    # A rename may reach the disk before contents that were not flushed: the name would then stand for empty files.
    for name in sorted(_files(directory) - found.keys()):
        with (directory / name).open("rb") as file:
            os.fsync(file.fileno())
        found[name] = hash_file(directory / name)
    run = run or RunId()
    files: dict[str, Plain] = {name: {"bytes": each.size, "xxh3": each.hashes} for name, each in sorted(found.items())}
    content: dict[str, Plain] = {
        "format": FORMAT,
        "run": run.id,
        "parent": run.parent,
        "serial": serial,
        "files": files,
    }
    replace_text(directory / INDEX, json.dumps({**content, "sha256": _own_hash(content)}, indent=1))
    for folder in {directory, *((directory / name).parent for name in found)}:
        flush_directory(folder)


def read_index(directory: Path) -> Index:
    """The index of a directory. Raises a ValueError in one line where it is not there, not whole or of another form."""
    path = directory / INDEX
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ValueError(f"{path} is not readable: {error.strerror or error}") from error
    try:
        return decode(content)
    except ValueError as error:
        raise ValueError(f"{path} is not readable: {error}") from error


def decode(content: bytes) -> Index:
    """The index in the bytes of its file. Raises a ValueError in one line for any other bytes."""
    try:
        if len(content) > MAX_BYTES:
            raise ValueError(f"it is larger than {MAX_BYTES} bytes")
        return _index(json.loads(content.decode(), object_pairs_hook=_once))
    except (ValueError, RecursionError) as error:
        raise ValueError(" ".join(str(error).split())) from error


def verify_files(directory: Path, index: Index, names: Collection[str] | None = None) -> None:
    """Compare files with the index, both ways. Raises DamagedError that names the first that differs.

    names: whose content is compared; None for all. Of the others only the size.
    """
    there = _files(directory)
    for name in sorted(index.files.keys() - there):
        raise DamagedError(f"{directory}: {name} is missing; the checkpoint is damaged")
    for name in sorted(there - index.files.keys()):
        # It would be read: descriptions of pieces are found by their names.
        raise DamagedError(
            f"{directory}: {name} is not in {INDEX}; the checkpoint is damaged, or somebody has added it"
        )
    for name, entry in index.files.items():
        path = directory / name
        # The size first: it tells a copy that was cut off without reading it.
        if path.stat().st_size != entry.size or ((names is None or name in names) and hash_file(path) != entry):
            raise DamagedError(f"{path} is not what was saved (its hash differs); the checkpoint is damaged")


def _files(directory: Path) -> set[str]:
    """Names of all that is below, but for directories and the index itself."""
    found = set()
    for folder, folders, files in os.walk(directory):
        inside = Path(folder)
        # A link to a directory is not gone into: it counts as a file, which no index has.
        names = [*files, *(name for name in folders if (inside / name).is_symlink())]
        found |= {(inside / name).relative_to(directory).as_posix() for name in names}
    return found - {INDEX}


def _once(pairs: list[tuple[str, Plain]]) -> dict[str, Plain]:
    found = dict(pairs)
    if len(found) != len(pairs):  # json would take the last of two silently
        raise ValueError("a name is in it twice")
    return found


def _own_hash(content: Mapping[str, Plain]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _index(value: Plain) -> Index:
    """Raises ValueError where something of it is not as `seal` writes it."""
    if not isinstance(value, dict) or type(value.get("format")) is not int:
        raise ValueError("it has no format number")
    if value["format"] != FORMAT:
        raise ValueError(f"it has format {value['format']}, this version reads format {FORMAT}")
    if value.keys() != _KEYS or value["sha256"] != _own_hash({k: v for k, v in value.items() if k != "sha256"}):
        raise ValueError("its own hash differs; it is damaged")
    run, parent, serial, files = value["run"], value["parent"], value["serial"], value["files"]
    if not (isinstance(run, str) and isinstance(parent, str) and type(serial) is int and isinstance(files, dict)):
        raise ValueError("run, parent, serial or files is not what it should be")
    if not files:
        raise ValueError("it lists no files")
    return Index(RunId(run, parent), serial, {name: _entry(name, entry) for name, entry in files.items()})


def _entry(name: str, entry: Plain) -> Entry:
    # The index may be a stranger's: no name may lead out of the directory, or be another way to write one.
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or path.as_posix() != name or not path.parts or "\0" in name:
        raise ValueError(f"{name!r} is no name of a file in a checkpoint")
    if isinstance(entry, dict) and entry.keys() == {"bytes", "xxh3"}:
        size, hashes = entry["bytes"], entry["xxh3"]
        if type(size) is int and isinstance(hashes, str) and len(hashes) == DIGITS * block_count(size):
            return Entry(size, hashes)
    raise ValueError(f"it does not say the bytes and the xxh3 of {name!r}")
