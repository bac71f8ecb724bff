"""Save and resume of a training run, exact to the bit and independent of the number of ranks."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from megatron_gemini.checkpoint import directory as layout
from megatron_gemini.checkpoint.extensions import Extensions, check_resumable
from megatron_gemini.checkpoint.pieces import MOMENTS, WEIGHT, Piece, PieceReader, cut
from megatron_gemini.engine.engine import Engine
from megatron_gemini.engine.internals.fragments import Fragment
from megatron_gemini.engine.internals.state import ensure_moments, has_moments, publish_masters, set_step_count
from megatron_gemini.engine.internals.swapping import put_back
from megatron_gemini.engine.zero import ZeroEngine
from megatron_gemini.parallel.parameters import placement_of

# What is put beside the weights: a file or directory to copy, a text, or a function that writes to a path.
Asset = Path | str | Callable[[Path], None]


@dataclass
class RunState:
    """Where a run is. step: updates made; data: state of every data lane by its number."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    optimizer_steps: int = 0
    data: dict[str, Any] = field(default_factory=dict)


def describe(fragment: Fragment) -> Piece:
    """The piece that a rank's fragment is in a checkpoint."""
    placement = placement_of(fragment.parameter)
    return Piece(
        fragment.name,
        fragment.start,
        fragment.count,
        fragment.shard_shape,
        placement.sharded_dim,
        placement.start if placement.sharded_dim is not None else 0,
        tuple(placement.global_shape),
    )


def save(engine: Engine, run: Path, progress: RunState, assets: dict[str, Asset], keep: int) -> Path:
    """Write a checkpoint; every rank calls it. Returns its directory.

    progress.data: this rank's lanes only. assets: what else belongs in it, by name.
    """
    temporary, final = layout.temporary_directory(run, progress.step), layout.step_directory(run, progress.step)
    rank = engine.topology.rank
    if rank == 0:
        layout.clear_unfinished(run)
        temporary.mkdir(parents=True)
    _barrier()
    _write_rank(engine, temporary / f"rank-{rank:05d}", progress)
    _barrier()
    if rank == 0:
        for name, source in assets.items():
            _add(temporary / name, source)
        state = {
            "step": progress.step,
            "tokens": progress.tokens,
            "seconds": progress.seconds,
            "optimizer_steps": progress.optimizer_steps,
        }
        layout.write_text(temporary / "state.json", json.dumps(state))
        Extensions.of(engine.config).write(temporary)
        layout.seal(temporary)
        layout.publish(temporary, final, keep)
    _barrier()
    return final


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def _write_rank(engine: Engine, stem: Path, progress: RunState) -> None:
    tensors: dict[str, torch.Tensor] = {}
    pieces: list[Fragment] = []
    for part in engine.parts:
        moments = MOMENTS if has_moments(part.deepspeed) else ()
        for fragment in part.owned():
            tensors[f"{WEIGHT}/{fragment.name}"] = fragment.master().detach().to("cpu", torch.float32).clone()
            for key in moments:
                tensors[f"{key}/{fragment.name}"] = fragment.moment(key).detach().to("cpu", torch.float32).clone()
            pieces.append(fragment)
        put_back(part.deepspeed)
    for frozen in engine.frozen:
        for fragment in frozen.owned():
            tensors[f"{WEIGHT}/{fragment.name}"] = fragment.master().detach().to("cpu", torch.float32).clone()
            pieces.append(fragment)
    save_file(tensors, stem.with_suffix(".safetensors"))
    description = {
        "pieces": [describe(fragment).to_json() for fragment in pieces],
        "data": progress.data,
    }
    layout.write_text(stem.with_suffix(".json"), json.dumps(description))


def _add(target: Path, source: Asset) -> None:
    if callable(source):
        source(target)
    elif isinstance(source, str):
        layout.write_text(target, source)
    elif source.is_dir():
        shutil.copytree(source, target)
    else:
        shutil.copyfile(source, target)


def load(engine: Engine, directory: Path) -> RunState:
    """Fill the engine from a checkpoint of any layout; returns where the run was.

    Raises `ValueError` that names the parameter and both shapes when the checkpoint is of another model, the file when
    it is damaged, or the plugin, control token, encoder, connector or objective that is another one now.
    """
    if engine.topology.rank == 0:
        layout.verify(directory)
    _barrier()
    check_resumable(directory, engine.config)
    reader = PieceReader(directory)
    frozen = [fragment for part in engine.frozen for fragment in part.fragments]
    everything = [fragment for part in engine.parts for fragment in part.fragments] + frozen
    check_shapes({fragment.name: describe(fragment).global_shape for fragment in everything}, reader)
    progress = read_progress(directory)
    for part in engine.parts:
        _fill(part, reader, progress.optimizer_steps)
    for fragment in frozen:
        if fragment.count:
            fragment.master().copy_(cut(reader.read(WEIGHT, fragment.name), describe(fragment)))
    return progress


def _fill(part: ZeroEngine, reader: PieceReader, optimizer_steps: int) -> None:
    if optimizer_steps:
        ensure_moments(part.deepspeed)
        set_step_count(part.deepspeed, optimizer_steps)
    for fragment in part.fragments:
        if not fragment.count:
            continue
        piece = describe(fragment)
        fragment.master().copy_(cut(reader.read(WEIGHT, fragment.name), piece))
        for key in MOMENTS if optimizer_steps else ():
            fragment.moment(key).copy_(cut(reader.read(key, fragment.name), piece))
    publish_masters(part.deepspeed)
    put_back(part.deepspeed)


def check_shapes(expected: dict[str, tuple[int, ...]], reader: PieceReader) -> None:
    """Raise `ValueError` at the first parameter that the checkpoint lacks or holds in another shape."""
    stored = set(reader.names())
    for name, shape in expected.items():
        if name not in stored:
            raise ValueError(f"{reader.directory} has no parameter {name} {shape}; it is of another model")
        if reader.shape(name) != shape:
            raise ValueError(
                f"{reader.directory} holds {name} with shape {reader.shape(name)}, the model has {shape}; "
                "use the configuration that it was trained with"
            )


def read_progress(directory: Path) -> RunState:
    """Where the run was when it was saved, with the states of all data lanes."""
    try:
        state = json.loads((directory / "state.json").read_text())
        data: dict[str, Any] = {}
        for description in sorted(directory.glob("rank-*.json")):
            data.update(json.loads(description.read_text())["data"])
        return RunState(**state, data=data)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{directory} has no readable state: {error}") from error
