"""A run's checkpoints on disk: written beside, hashed, then renamed into place.

<run>/checkpoints/step-00000600/   complete, or not there at all
<run>/checkpoints/latest           the name of the newest complete one
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

INDEX = "index.json"
FORMAT = 1  # of the index, the pieces and the state together
_STEP = re.compile(r"step-(\d{8})$")


def step_directory(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def temporary_directory(run: Path, step: int) -> Path:
    return run / "checkpoints" / f".step-{step:08d}.tmp"


def clear_unfinished(run: Path) -> None:
    """Delete what saves that were killed have left."""
    for path in (run / "checkpoints").glob(".step-*.tmp"):
        shutil.rmtree(path, ignore_errors=True)


def step_of(directory: Path) -> int:
    match = _STEP.match(directory.name)
    assert match, directory
    return int(match.group(1))


def complete_steps(run: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    found = [path for path in (run / "checkpoints").glob("step-*") if _STEP.match(path.name) and is_complete(path)]
    return sorted(found, key=step_of)  # a directory lists its entries in any order


def is_complete(directory: Path) -> bool:
    return (directory / INDEX).is_file()


def newest(run: Path) -> Path | None:
    """The checkpoint that `latest` names; the newest complete one where `latest` is missing or names none."""
    pointer = run / "checkpoints" / "latest"
    steps = complete_steps(run)
    # A copy of the run may lack the pointer or have an old one, which must not hide the checkpoints that are there.
    if pointer.is_file():
        named = pointer.read_text(errors="replace").strip()
        for path in steps:
            if path.name == named:
                return path
    return steps[-1] if steps else None


def resolve(path: Path) -> Path:
    """The step directory that a user means by a step directory or a run directory.

    Raises `ValueError` when there is no complete checkpoint.
    """
    if not path.exists():
        raise ValueError(f"checkpoint {path} does not exist")
    if is_complete(path):
        return path
    found = newest(path)
    if found is None:
        raise ValueError(f"{path} holds no complete checkpoint; give a run directory or one of its checkpoints/step-*")
    return found


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


def seal(directory: Path) -> None:
    """Flush every file to the disk, then write the index of names, sizes and hashes that makes a directory complete."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    # A rename may reach the disk before contents that were not flushed: the name would then stand for empty files.
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
    entries = {
        str(path.relative_to(directory)): {"bytes": path.stat().st_size, "sha256": file_hash(path)} for path in files
    }
    write_text(directory / INDEX, json.dumps({"format": FORMAT, "files": entries}, indent=1))


def verify(directory: Path) -> None:
    """Compare every file with the index. Raises `ValueError` that names the first that differs."""
    try:
        index = json.loads((directory / INDEX).read_text())
        form, entries = index["format"], dict(index["files"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{directory / INDEX} is not readable: {error}{_way_out(directory)}") from error
    if form != FORMAT:
        raise ValueError(f"{directory} has format {form}; this version reads format {FORMAT}")
    for name, entry in entries.items():
        path = directory / name
        # The index may be a stranger's, and no name in it may lead out of the directory.
        if ".." in Path(name).parts or Path(name).is_absolute() or not path.is_file():
            raise ValueError(f"{directory}: {name} is missing; the checkpoint is damaged{_way_out(directory)}")
        # The size first: it tells a copy that was cut off without reading it.
        if path.stat().st_size != entry["bytes"] or file_hash(path) != entry["sha256"]:
            raise ValueError(
                f"{path} is not what was saved (its hash differs); the checkpoint is damaged{_way_out(directory)}"
            )


def _way_out(damaged: Path) -> str:
    """What to do about a damaged checkpoint, as the end of an error message."""
    if damaged.parent.name != "checkpoints":
        return ""
    others = [path for path in complete_steps(damaged.parent.parent) if path.name != damaged.name]
    if not others:
        return "; no other checkpoint is beside it"
    return f"; {others[-1].name} beside it is complete: delete {damaged} to take that"


def publish(temporary: Path, final: Path, keep: int) -> None:
    """Rename a sealed directory into place, point `latest` at it, delete all but the newest `keep` up to it.

    Later steps than this one, of a run that was begun anew, are left to the user.
    """
    if final.exists():  # of a run that was begun anew; no system call puts a directory in the place of a full one
        replaced = temporary_directory(final.parent.parent, step_of(final)).with_suffix(".old.tmp")
        os.replace(final, replaced)
    os.replace(temporary, final)
    pointer = final.parent / "latest"
    # Beside it and renamed, so that a reader finds the old name or the new one, never an empty file.
    write_text(pointer.with_suffix(".tmp"), final.name + "\n")
    os.replace(pointer.with_suffix(".tmp"), pointer)
    clear_unfinished(final.parent.parent)
    steps = [path for path in complete_steps(final.parent.parent) if step_of(path) <= step_of(final)]
    for old in steps[:-keep]:  # last: whatever ends the process before leaves one checkpoint too many, not too few
        shutil.rmtree(old)
