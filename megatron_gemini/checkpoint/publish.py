"""What changes a run's folder of checkpoints: publishing one, deleting old ones, and putting back what a kill has left.

Every change is one rename, before and after which a complete copy has a name that `directory` knows.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from megatron_gemini.checkpoint.directory import ASIDE, STEP, aside, complete, complete_steps, step_directory
from megatron_gemini.checkpoint.index import Index, RunId, flush_directory, replace_text


def remove(path: Path) -> None:
    """Delete a directory with all that is in it, a file, or a link without what it leads to."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path)


def publish(temporary: Path, final: Path, keep: int, run: RunId, every: int = 0) -> None:
    """Rename a sealed directory into place, point `latest` at it, delete all but the newest `keep` of this run.

    every: checkpoints whose step is a multiple of it stay as well. Those of another run in the same folder are left to
    the user.
    """
    replaced = _put(temporary, final)
    flush_directory(final.parent)  # a crash of the machine may undo a rename that is not on the disk
    replace_text(final.parent / "latest", final.name + "\n")
    remove(replaced)
    steps = [(index, path) for index, path in complete_steps(final.parent.parent) if STEP.fullmatch(path.name)]
    mine = lineage(run, [index for index, _ in steps])
    own = [path for index, path in steps if index.run.id in mine]
    for old in rotated(own, keep, every):  # last: whatever ends the process before leaves one too many, not too few
        unpublish(old)


def rotated(own: Sequence[Path], keep: int, every: int) -> list[Path]:
    """Those of a run's checkpoints, in the order in which they were saved, that go."""
    return [path for path in own[:-keep] if not every or int(path.name.removeprefix("step-")) % every]


def lineage(run: RunId, indices: list[Index]) -> set[str]:
    """Ids of this start of a run, and of all that it went on from."""
    parents = {index.run.id: index.run.parent for index in indices} | {run.id: run.parent}
    found, each = set[str](), run.id
    while each and each not in found:
        found.add(each)
        each = parents.get(each, "")
    return found


def _put(path: Path, final: Path) -> Path:
    """Rename to the final name. Returns where the one before is now, if there was one."""
    replaced = aside(final, ".old")
    # No system call puts a directory in the place of a full one. Between the two renames both are complete under names
    # that `complete_steps` knows.
    if os.path.lexists(final):
        remove(replaced)
        os.replace(final, replaced)
    os.replace(path, final)
    return replaced


def unpublish(final: Path) -> None:
    """Delete a checkpoint, whole or not at all to those who read."""
    # Renamed first: a kill in the midst of the deletion would leave a part of it under the final name for ever.
    moved = aside(final, ".deleted")
    remove(moved)
    os.replace(final, moved)
    remove(moved)


def recover(run: Path) -> list[str]:
    """Put back what a kill has left aside and is complete, delete the rest. Returns a line on each that was put back.

    Only while no other process writes here.
    """
    copies: dict[Path, list[tuple[int, Path]]] = {}
    for path in (run / "checkpoints").glob(".step-*.tmp"):
        match = ASIDE.fullmatch(path.name)
        index = complete(path) if match and match.group(2) != ".deleted" else None
        if match and index is not None:
            copies.setdefault(step_directory(run, int(match.group(1))), []).append((index.serial, path))
        else:
            remove(path)
    told = []
    for final, found in sorted(copies.items()):
        serial, newest_copy = max(found)
        there = complete(final)
        if there is None or there.serial < serial:
            if os.path.lexists(final):
                unpublish(final)
            os.replace(newest_copy, final)
            told.append(f"put back {final}, which was complete when the run was ended")
        for _, path in found:  # only now: until the rename each may have been the one complete copy
            remove(path)
    return told
