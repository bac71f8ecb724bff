"""Save and resume of a training run, exact to the bit and independent of the number of ranks."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError

from megatron_gemini.checkpoint import directory as layout
from megatron_gemini.checkpoint.extensions import Extensions, check_resumable
from megatron_gemini.checkpoint.fragments import check_shapes, describe, fill
from megatron_gemini.checkpoint.index import RunId, read_index, seal, write_text
from megatron_gemini.checkpoint.init_from import initialize_roles
from megatron_gemini.checkpoint.pieces import MOMENTS, WEIGHT, PieceJson, PieceReader, write_tensors
from megatron_gemini.checkpoint.publish import publish, recover
from megatron_gemini.engine.engine import Engine
from megatron_gemini.engine.module_engine import ModuleEngine
from megatron_gemini.engine.settings import Json
from megatron_gemini.engine.zero import ZeroEngine

_STATE = {"step", "tokens", "seconds", "optimizer_steps", "moments_since"}
ROLES = "roles.json"
"""What each role beside the policy began as, where there are any."""

# What is put beside the weights: a file or directory to copy, a text, or a function that writes to a path.
Asset = Path | str | Callable[[Path], None]


@dataclass
class RunState:
    """Where a run is.

    step: updates made. data: state of every data lane by its number. moments_since: optimizer_steps at which Adam's
    moments of a parameter began, of those that were frozen before. run: of this start of it. told: by `load`.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    optimizer_steps: int = 0  # fewer than `step` where a norm was not finite; Adam's bias correction needs this count
    moments_since: dict[str, int] = field(default_factory=dict)
    data: dict[str, Json] = field(default_factory=dict)
    told: list[str] = field(default_factory=list)
    run: RunId = field(default_factory=RunId)


def save(engine: Engine, run: Path, progress: RunState, assets: dict[str, Asset], keep: int) -> Path:
    """Write a checkpoint; every rank calls it. Returns its directory.

    progress.data: this rank's lanes only. assets: what else belongs in it, by name.
    Raises ValueError on a rank that cannot write.
    """
    with _telling(layout.step_directory(run, progress.step)):
        return _save(engine, run, progress, assets, keep)


@contextlib.contextmanager
def _telling(final: Path) -> Iterator[None]:
    """A full disk or a folder that is read-only is nothing that a traceback explains."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        why = (error.strerror if isinstance(error, OSError) else "") or str(error)
        raise ValueError(
            f"cannot write {final}: {why}; checkpoints before it are whole, and the same command goes on from the "
            "newest one once there is room (train.keep says how many are kept)"
        ) from error


def _save(engine: Engine, run: Path, progress: RunState, assets: dict[str, Asset], keep: int) -> Path:
    temporary, final = layout.temporary_directory(run, progress.step), layout.step_directory(run, progress.step)
    rank = engine.topology.rank
    if rank == 0:
        recover(run)
        temporary.mkdir(parents=True)
    _barrier()  # what a killed save left is gone before anybody writes
    _write_rank(engine, temporary / f"rank-{rank:05d}", progress)
    _barrier()  # the seal is over the files of all ranks
    if rank == 0:
        for name, source in assets.items():
            _add(temporary / name, source)
        state = {
            "step": progress.step,
            "tokens": progress.tokens,
            "seconds": progress.seconds,
            "optimizer_steps": progress.optimizer_steps,
            "moments_since": progress.moments_since,
        }
        write_text(temporary / "state.json", json.dumps(state))
        Extensions.of(engine.config).write(temporary)
        if engine.roles:
            origins = {name: role.origin for name, role in engine.roles.items()}
            write_text(temporary / ROLES, json.dumps(origins))
        seal(temporary, progress.run, layout.next_serial(run))
        publish(temporary, final, keep, progress.run)
    _barrier()  # a rank that ended before would make the launcher end rank 0 within its save
    return final


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def _write_rank(engine: Engine, stem: Path, progress: RunState) -> None:
    tensors: dict[str, torch.Tensor] = {}
    pieces: list[PieceJson] = []
    for role, part in _saved(engine):
        # Before the first update there are no moments, and a resume begins with fresh ones as well.
        kinds = (WEIGHT, *(MOMENTS if isinstance(part, ZeroEngine) and part.wrapper.has_moments() else ()))
        for fragment in part.owned():
            piece = describe(fragment, role)
            pieces.append(piece.to_json())
            for kind in kinds:
                held = fragment.master() if kind == WEIGHT else fragment.moment(kind)
                # float32 at any precision: bf16 weights would lose what has been added below their last bit.
                # A copy also on a CPU: what lies on a disk comes in one group at a time, in the same memory.
                tensors[f"{kind}/{piece.name}"] = held.detach().to("cpu", torch.float32).clone()
        if isinstance(part, ZeroEngine):
            part.wrapper.put_back()
    write_tensors(stem.with_suffix(".safetensors"), tensors)
    # Each rank writes the state of its own data lanes too, so that nothing has to be gathered.
    write_text(stem.with_suffix(".json"), json.dumps({"pieces": pieces, "data": progress.data}))


def _saved(engine: Engine) -> Iterator[tuple[str, ModuleEngine]]:
    """(role, engine) of all that a checkpoint holds, the policy's role being ""."""
    yield from (("", part) for part in (*engine.parts, *engine.frozen))
    for role in engine.roles.values():
        if role.in_checkpoints:
            yield from ((role.spec.name, part) for part in role.engines)


def _add(target: Path, source: Asset) -> None:
    if callable(source):
        source(target)
    elif isinstance(source, str):
        write_text(target, source)
    elif source.is_dir():
        shutil.copytree(source, target)
    else:
        shutil.copyfile(source, target)


def load(engine: Engine, directory: Path) -> RunState:
    """Fill the engine from a checkpoint of any layout; returns where the run was.

    Raises `ValueError` that names the parameter and both shapes when the checkpoint is of another model, or the file
    when it is damaged. The same for a plugin, control token, encoder, connector or objective that is another one now.
    """
    if engine.topology.rank == 0:
        layout.verify(directory)  # by one rank: it reads every byte, of files that all ranks share
    _barrier()
    # First: that a plugin is missing says more than that a parameter is.
    check_resumable(directory, engine.config)
    told = initialize_roles(engine)
    _check_origins(engine, directory)
    readers = {role: PieceReader(directory, role) for role in dict.fromkeys(role for role, _ in _saved(engine))}
    for role, part in _saved(engine):
        check_shapes(part.fragments, readers[role])
    progress = read_progress(directory)
    progress.run = RunId(parent=read_index(directory).run.id)
    progress.told += told
    for role, part in _saved(engine):
        if isinstance(part, ZeroEngine) and progress.optimizer_steps:
            _begin_moments(part, role, readers[role], progress)
        fill(part.fragments, readers[role])
        if isinstance(part, ZeroEngine):
            part.wrapper.publish_masters()
            part.wrapper.put_back()
    return progress


def _begin_moments(part: ZeroEngine, role: str, reader: PieceReader, progress: RunState) -> None:
    """Adam's moments from the checkpoint. What was frozen there has none and begins with fresh ones."""
    names = [f"{role}:{name}" if role else name for name, _ in part.wrapper.trained]
    fresh = [name for name in names if not reader.has(MOMENTS[0], name.rpartition(":")[2])]
    progress.moments_since |= dict.fromkeys(fresh, progress.optimizer_steps)
    if fresh:
        modules = sorted({".".join(name.split(".")[:2]) for name in fresh})
        progress.told.append(
            f"{', '.join(modules)} ({len(fresh)} parameters): frozen until now, the optimizer's moments begin fresh"
        )
    if len(fresh) == len(names):
        return  # as in a new run: bias correction counts from here
    part.wrapper.ensure_moments()
    # One count for all that an engine trains. The oldest moments have it, and fresh ones beside them grow as slowly.
    since = min(progress.moments_since.get(name, 0) for name in names)
    part.wrapper.set_step_count(progress.optimizer_steps - since)
    fill([fragment for fragment in part.fragments if reader.has(MOMENTS[0], fragment.name)], reader, MOMENTS)


def _check_origins(engine: Engine, directory: Path) -> None:
    """Raise `ValueError` if a role that the checkpoint does not hold began as something else there than here.

    The others take their weights from the checkpoint, and with them what is recorded there.
    """
    recorded: dict[str, str] = {}
    if (directory / ROLES).is_file():
        try:
            recorded = {name: str(origin) for name, origin in json.loads((directory / ROLES).read_text()).items()}
        except (OSError, ValueError, AttributeError, RecursionError) as error:
            raise ValueError(f"{directory / ROLES} is not readable: {error}; the checkpoint is damaged") from error
    for name, role in engine.roles.items():
        there = recorded.get(name, role.origin)
        if role.in_checkpoints:
            role.origin = there
        elif there != role.origin:
            raise ValueError(
                f"in {directory} the role {name} is {there}, here it is {role.origin}; "
                "give it the weights that the run began with"
            )


def read_progress(directory: Path) -> RunState:
    """Where the run was when it was saved, with the states of all data lanes."""
    try:
        state = json.loads((directory / "state.json").read_text())
        data: dict[str, Json] = {}
        for description in sorted(directory.glob("rank-*.json")):
            data.update(json.loads(description.read_text())["data"])
        if state.keys() != _STATE:
            raise ValueError("state.json has other names than this version writes")
        found = RunState(**state, data=data)
        counts = {name: getattr(found, name) for name in ("step", "tokens", "optimizer_steps")}
        for name, value in (counts | dict(found.moments_since)).items():
            _check_count(name, value)
        found.seconds = float(found.seconds)
        return found
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{directory} has no readable state: {error}") from error


def _check_count(name: str, value: Json) -> None:
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise ValueError(f"{name} is {value!r}")
