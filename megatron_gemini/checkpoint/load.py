"""Going on from a checkpoint of any layout: every rank reads its own ranges, and trusts what has been compared."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_gemini.checkpoint import directory as layout
from megatron_gemini.checkpoint.extensions import check_resumable
from megatron_gemini.checkpoint.fragments import check_shapes, fill
from megatron_gemini.checkpoint.index import RunId, read_index
from megatron_gemini.checkpoint.init_from import initialize_roles
from megatron_gemini.checkpoint.piece import MOMENTS
from megatron_gemini.checkpoint.pieces import PieceReader
from megatron_gemini.checkpoint.run_state import RunState, read_progress
from megatron_gemini.checkpoint.save import ROLES, saved_parts
from megatron_gemini.engine.engine import Engine
from megatron_gemini.engine.zero import ZeroEngine


def load(engine: Engine, directory: Path) -> RunState:
    """Fill the engine from a checkpoint of any layout; returns where the run was.

    Raises `ValueError` that names the parameter and both shapes when the checkpoint is of another model, or the file
    when it is damaged. The same for a plugin, control token, encoder, connector or objective that is another one now.
    """
    # All but the weights and moments, which are compared block by block as they are read.
    layout.verify(directory, but_pieces=True)
    # First: that a plugin is missing says more than that a parameter is.
    check_resumable(directory, engine.config)
    told = initialize_roles(engine)
    _check_origins(engine, directory)
    readers = {role: PieceReader(directory, role) for role in dict.fromkeys(role for role, _ in saved_parts(engine))}
    for role, part in saved_parts(engine):
        check_shapes(part.fragments, readers[role])
    progress = read_progress(directory)
    progress.run = RunId(parent=read_index(directory).run.id)
    progress.told += told
    with layout.telling_way_out(directory):
        for role, part in saved_parts(engine):
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
