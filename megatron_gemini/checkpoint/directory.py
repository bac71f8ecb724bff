"""A run's checkpoints on disk: written beside, hashed, then renamed into place.

<run>/checkpoints/step-00000600/   complete
<run>/checkpoints/latest           the name of the one that was published last

Three more names exist for a moment, or where a process was killed: `.step-N.tmp` is being written, `.step-N.old.tmp`
was replaced, `.step-N.deleted.tmp` is being deleted. The first two may be complete: `publish.recover` puts them back.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from megatron_gemini.checkpoint.blocks import DamagedError
from megatron_gemini.checkpoint.index import INDEX, Index, read_index, verify_files

logger = logging.getLogger(__name__)
T = TypeVar("T")
MAX_NAME = 4096
ATTEMPTS = 5
"""How often a reader begins again because a run has deleted what it was reading."""
STEP = re.compile(r"step-(\d{8,})")
PIECES = re.compile(r"rank-\d{5,}\.safetensors")
ASIDE = re.compile(r"\.step-(\d{8,})(\.old|\.deleted|)\.tmp")


def step_directory(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def temporary_directory(run: Path, step: int) -> Path:
    return aside(step_directory(run, step), "")


def aside(final: Path, why: str) -> Path:
    return final.with_name(f".{final.name}{why}.tmp")


def complete(directory: Path) -> Index | None:
    """The index of a complete checkpoint; None of what is none, or has a damaged index."""
    with contextlib.suppress(ValueError):
        return read_index(directory)
    return None


def is_complete(directory: Path) -> bool:
    """Whether there is an index, which `verify` may still find damaged."""
    return (directory / INDEX).is_file()


def complete_steps(run: Path) -> list[tuple[Index, Path]]:
    """Complete checkpoints of a folder in the order in which they were saved, also those that a kill left aside."""
    found = []
    for path in (run / "checkpoints").glob("*step-*"):
        beside = ASIDE.fullmatch(path.name)
        if STEP.fullmatch(path.name) or (beside and beside.group(2) != ".deleted"):
            index = complete(path)
            if index is not None:
                found.append((index, path))
    # By the serial number and not by the step: a run that was begun anew leaves later steps of the one before.
    return sorted(found, key=lambda each: (each[0].serial, each[1].name))


def next_serial(run: Path) -> int:
    return max((index.serial for index, _ in complete_steps(run)), default=0) + 1


@dataclass(frozen=True)
class Newest:
    """The checkpoint that was published last, None if there is none. warnings: what is not as it should be."""

    path: Path | None
    index: Index | None
    warnings: list[str]


def newest(run: Path) -> Newest:
    """The complete checkpoint that was published last.

    Raises ValueError where the one that `latest` names is there with a damaged index, and where `latest` is a folder.
    """
    folder, warnings = run / "checkpoints", list[str]()
    pointer = folder / "latest"
    if pointer.is_dir():
        raise ValueError(f"{pointer} is a folder, in the place of a file with the name of a checkpoint; remove it")
    for _ in range(ATTEMPTS):
        named, steps = _named(pointer), complete_steps(run)
        if _named(pointer) == named:  # and no run has saved between the two looks
            break
    index, path = steps[-1] if steps else (None, None)
    whole = {each.name.removeprefix(".").split(".")[0] for _, each in steps}
    broken = [p for p in sorted(folder.glob("step-*")) if STEP.fullmatch(p.name) and complete(p) is None]
    # A copy of the run may have an old pointer. It must not hide the checkpoints that are there.
    if STEP.fullmatch(named) and named not in whole:
        if is_complete(folder / named):
            _check_index(folder / named)
        what = "has no index.json" if (folder / named).exists() else "is not there"
        warnings.append(f"{pointer} names {named}, which {what}")
    elif pointer.exists() and not STEP.fullmatch(named):
        warnings.append(f"{pointer} is damaged: it names no checkpoint")
    warnings += [f"{each} is not complete and is left out" for each in broken if each.name != named]
    return Newest(path, index, warnings)


def _named(pointer: Path) -> str:
    with contextlib.suppress(OSError), pointer.open(errors="replace") as file:
        return file.read(MAX_NAME).strip()
    return ""


def resolve(path: Path) -> Path:
    """The step directory that a user means by a step directory or a run directory.

    Raises `ValueError` when there is no complete checkpoint.
    """
    if not path.exists():
        raise ValueError(f"checkpoint {path} does not exist")
    if is_complete(path):
        return path
    found = newest(path)
    if found.path is None:
        raise ValueError(f"{path} holds no complete checkpoint; give a run directory or one of its checkpoints/step-*")
    for warning in found.warnings:
        logger.warning("%s; taking %s", warning, found.path)
    return found.path


def verify(directory: Path, but_pieces: bool = False) -> None:
    """Compare every file with the index. Raises `ValueError` that names the first that differs.

    but_pieces: of files of pieces the size alone, since `PieceReader` compares what it reads of them.
    """
    with held(directory), telling_way_out(directory):
        index = _check_index(directory)
        verify_files(directory, index, [n for n in index.files if not (but_pieces and PIECES.fullmatch(n))])


@contextlib.contextmanager
def telling_way_out(directory: Path) -> Iterator[None]:
    """Whatever is found damaged inside is told with the checkpoint to take in its place."""
    try:
        yield
    except DamagedError as error:
        raise DamagedError(f"{error}{_way_out(directory)}") from error


def _check_index(directory: Path) -> Index:
    try:
        return read_index(directory)
    except ValueError as error:
        raise ValueError(f"{error}{_way_out(directory)}") from error


def _way_out(damaged: Path) -> str:
    """What to do about a damaged checkpoint, as the end of an error message."""
    if damaged.parent.name != "checkpoints":
        return ""
    others = [path for _, path in complete_steps(damaged.parent.parent) if path.name != damaged.name]
    if not others:
        return "; no other checkpoint is beside it"
    return f"; {others[-1].name} beside it is complete: delete {damaged} to take that"


class ReplacedError(ValueError):
    """A run has deleted or replaced a checkpoint while it was being read."""


@contextlib.contextmanager
def held(directory: Path) -> Iterator[None]:
    """Raise `ReplacedError` if the checkpoint is not the same any more at the end, whatever was found in it."""
    before = _identity(directory)
    try:
        yield
    except (ValueError, OSError) as error:
        if _identity(directory) == before:
            raise
        raise _replaced(directory) from error
    if _identity(directory) != before:
        raise _replaced(directory)


def _identity(directory: Path) -> bytes:
    # A run renames before it deletes, so that this tells a deletion from a damage.
    with contextlib.suppress(OSError):
        return (directory / INDEX).read_bytes()
    return b""


def _replaced(directory: Path) -> ReplacedError:
    return ReplacedError(
        f"{directory} was deleted or replaced while it was read; a run keeps its newest train.keep checkpoints: "
        "name the run's directory, or copy the checkpoint first"
    )


def read_newest(path: Path, find: Callable[[Path], Path], read: Callable[[Path], T]) -> T:
    """read(find(path)), again with the newest checkpoint where a run has deleted the one that was being read.

    Raises ValueError if `path` is that checkpoint itself.
    """
    for left in reversed(range(ATTEMPTS)):
        directory = find(path)
        try:
            with held(directory):
                return read(directory)
        except ReplacedError:
            if directory == path or not left:
                raise
    raise AssertionError("unreachable")
