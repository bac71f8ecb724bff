"""Saving a training run: every rank writes and hashes its own files, and all agree before one of them commits.

Nothing is read back, and no rank holds more than one tensor beside its state. What fails on one rank fails on all, as
an error that a run can go on after: what was complete before still is.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

from megatron_gemini.checkpoint import directory as layout
from megatron_gemini.checkpoint.blocks import Entry, hash_file
from megatron_gemini.checkpoint.extensions import Extensions
from megatron_gemini.checkpoint.fragments import describe
from megatron_gemini.checkpoint.index import seal, write_text
from megatron_gemini.checkpoint.piece import MOMENTS, WEIGHT, PieceJson
from megatron_gemini.checkpoint.publish import publish, recover, remove
from megatron_gemini.checkpoint.run_state import RunState
from megatron_gemini.checkpoint.tensor_file import Outgoing, write_tensors
from megatron_gemini.engine.engine import Engine
from megatron_gemini.engine.internals.fragments import Fragment
from megatron_gemini.engine.module_engine import ModuleEngine
from megatron_gemini.engine.zero import ZeroEngine

ROLES = "roles.json"
"""What each role beside the policy began as, where there are any."""
# What is put beside the weights: a file or directory to copy, a text, or a function that writes to a path.
Asset = Path | str | Callable[[Path], None]
Result = TypeVar("Result")


class SaveError(ValueError):
    """A checkpoint could not be written, on all ranks alike. Those before it are whole."""


def save(engine: Engine, run: Path, progress: RunState, assets: dict[str, Asset], keep: int, every: int = 0) -> Path:
    """Write a checkpoint; every rank calls it. Returns its directory.

    progress.data: this rank's lanes only. assets: what else belongs in it, by name. keep, every: as `publish`.
    Raises SaveError on every rank where one cannot write.
    """
    temporary, final = layout.temporary_directory(run, progress.step), layout.step_directory(run, progress.step)
    rank = engine.topology.rank

    def prepare() -> None:
        recover(run)
        temporary.mkdir(parents=True)

    def commit(entries: dict[str, Entry]) -> None:
        for name, source in assets.items():
            _add(temporary / name, source)
        _write_state(engine, temporary, progress)
        seal(temporary, progress.run, layout.next_serial(run), entries)
        publish(temporary, final, keep, progress.run, every)

    try:
        # What a killed save left is gone before anybody writes.
        _agreed(engine, final, prepare if rank == 0 else _nothing)
        found = _agreed(engine, final, partial(_write_rank, engine, temporary / f"rank-{rank:05d}", progress))
        entries = {name: entry for of_rank in found for name, entry in of_rank.items()}
        # All know how it ended before one goes on: a rank that ended would make the launcher end rank 0 in its commit.
        _agreed(engine, final, partial(commit, entries) if rank == 0 else _nothing)
    except SaveError:
        if rank == 0:
            with contextlib.suppress(OSError):  # the next save does it
                remove(temporary)
        raise
    return final


def _nothing() -> None:
    pass


def _agreed(engine: Engine, final: Path, act: Callable[[], Result]) -> list[Result]:
    """What `act` gave on all ranks. Raises SaveError on all of them where it failed on one."""
    result, problem = list[Result](), ""
    try:
        result.append(act())
    except (OSError, ValueError) as error:
        problem = (error.strerror if isinstance(error, OSError) else "") or str(error)
    gathered = engine.gather((result, problem))
    failed = [(rank, problem) for rank, (_, problem) in enumerate(gathered) if problem]
    if failed:
        where = f" on rank {failed[0][0]}" if engine.topology.world > 1 else ""
        raise SaveError(
            f"cannot write {final}: {failed[0][1]}{where}; checkpoints before it are whole, and the same command goes "
            "on from the newest one once there is room (train.keep says how many are kept)"
        )
    return [one for each, _ in gathered for one in each]


def _write_rank(engine: Engine, stem: Path, progress: RunState) -> dict[str, Entry]:
    """This rank's files, with what the index says of them."""
    pieces, tensors = list[PieceJson](), list[Outgoing]()
    for role, part in saved_parts(engine):
        # Before the first update there are no moments, and a resume begins with fresh ones as well.
        kinds = (WEIGHT, *(MOMENTS if isinstance(part, ZeroEngine) and part.wrapper.has_moments() else ()))
        for fragment in part.owned():
            piece = describe(fragment, role)
            pieces.append(piece.to_json())
            # float32 at any precision: bf16 weights would lose what has been added below their last bit. Those that are
            # frozen have nothing below it.
            dtype = torch.float32 if isinstance(part, ZeroEngine) else part.dtype
            for kind in kinds:
                read = partial(_held, fragment, kind)
                tensors.append(Outgoing(f"{kind}/{piece.name}", (piece.count,), dtype, read))
    weights, description = stem.with_suffix(".safetensors"), stem.with_suffix(".json")
    try:
        written = write_tensors(weights, tensors)
    finally:
        for _, part in saved_parts(engine):
            if isinstance(part, ZeroEngine):
                part.wrapper.put_back()
    # Each rank writes the state of its own data lanes too, so that nothing has to be gathered.
    write_text(description, json.dumps({"pieces": pieces, "data": progress.data}))
    return {weights.name: written, description.name: hash_file(description)}


def _held(fragment: Fragment, kind: str) -> torch.Tensor:
    # When its turn has come: what lies on a disk comes in one group at a time, in the same memory.
    return fragment.master() if kind == WEIGHT else fragment.moment(kind)


def saved_parts(engine: Engine) -> Iterator[tuple[str, ModuleEngine]]:
    """(role, engine) of all that a checkpoint holds, the policy's role being ""."""
    yield from (("", part) for part in (*engine.parts, *engine.frozen))
    for role in engine.roles.values():
        if role.in_checkpoints:
            yield from ((role.spec.name, part) for part in role.engines)


def _write_state(engine: Engine, directory: Path, progress: RunState) -> None:
    write_text(directory / "state.json", json.dumps(progress.to_json()))
    Extensions.of(engine.config).write(directory)
    if engine.roles:
        write_text(directory / ROLES, json.dumps({name: role.origin for name, role in engine.roles.items()}))


def _add(target: Path, source: Asset) -> None:
    if callable(source):
        source(target)
    elif isinstance(source, str):
        write_text(target, source)
    elif source.is_dir():
        shutil.copytree(source, target)
    else:
        shutil.copyfile(source, target)
