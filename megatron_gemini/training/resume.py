"""Where a run goes on from: the checkpoint, and whether what is asked for now fits it."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file

from megatron_gemini.checkpoint import directory as layout
from megatron_gemini.checkpoint.blocks import Entry, hash_file
from megatron_gemini.checkpoint.extensions import check_resumable, read_checkpoint_config
from megatron_gemini.checkpoint.index import RunId, read_index, replace_text, telling, verify_files
from megatron_gemini.checkpoint.publish import lineage, recover
from megatron_gemini.checkpoint.run_state import read_progress
from megatron_gemini.checkpoint.save import Asset
from megatron_gemini.config.on_resume import refuse_changes
from megatron_gemini.config.run import RunConfig
from megatron_gemini.engine.engine import Engine
from megatron_gemini.training.schedule import learning_rate

STARTED = "started.json"
"""In the run's folder: the id of the newest start of a run, which may have saved nothing."""
MAX_BYTES = 4096


def find(engine: Engine, run: Path, resume: bool) -> tuple[Path | None, list[str]]:
    """(the checkpoint to go on from, None to begin anew; what to tell), the same on every rank.

    Raises the same ValueError on every rank where there are checkpoints and none is complete.
    """
    path, told, problem = None, list[str](), ""
    if engine.topology.rank == 0:  # alone: other ranks may see an older state of the folder
        try:
            told = recover(run)
            if resume:
                path, more = _choose(run)
                told += more
        except (ValueError, OSError) as error:
            problem = str(error)
    path, told, problem = engine.gather((path, told, problem))[0]
    if problem:
        raise ValueError(problem)
    return path, told


def _choose(run: Path) -> tuple[Path | None, list[str]]:
    found = layout.newest(run)
    if found.path is None or found.index is None:
        if found.warnings:  # and not from the beginning, which would empty the records of what is perhaps still there
            raise ValueError(
                f"{'; '.join(found.warnings)}; no checkpoint in {run} is complete: put one back, or begin anew by "
                "--train.no_resume"
            )
        return None, []
    told = [f"warning: {warning}" for warning in found.warnings]
    started = _read_started(run)
    if started is not None and found.index.run.id not in (started.id, started.parent):
        told.append(
            f"warning: the newest start of a run in {run} has left no checkpoint; {found.path.name} is of another one"
        )
    steps = layout.complete_steps(run)
    mine = lineage(found.index.run, [index for index, _ in steps])
    others = [path.name for index, path in steps if index.run.id not in mine]
    if others:
        told.append(f"beside it are checkpoints of another run, which are left alone: {', '.join(others)}")
    return found.path, told


def record_start(run: Path, start: RunId) -> None:
    """Leave a trace of a start, so that the next one knows whether what it finds was saved by this one."""
    with telling(run / STARTED):
        run.mkdir(parents=True, exist_ok=True)
        replace_text(run / STARTED, json.dumps({"run": start.id, "parent": start.parent}))


def _read_started(run: Path) -> RunId | None:
    """None where there is none, or no readable one: it only decides what is told."""
    try:
        with (run / STARTED).open("rb") as file:
            found = json.loads(file.read(MAX_BYTES))
        return RunId(str(found["run"]), str(found["parent"]))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def check_settings(directory: Path, config: RunConfig, assets: Mapping[str, Asset]) -> list[str]:
    """What to tell of settings that are other ones than in the checkpoint.

    assets: what the run would save beside its weights.
    Raises ValueError for one with which the run could not go on: see `config.on_resume`, and for another text model or
    image tokenizer.
    """
    check_resumable(directory, config)  # first: that a plugin is missing says more than that a setting is unknown
    index = read_index(directory)
    verify_files(directory, index, ["config.yaml"])  # a flipped bit in it is no other setting
    there = read_checkpoint_config(directory)
    told = [refuse_changes(there, config, str(directory))]
    for name, source in assets.items():
        if not _is_same(directory, index.files, name, source):
            setting = {"text.model": f"data.text_model {config.data.text_model}"}.get(name, f"train.{name}")
            raise ValueError(
                f"{setting} is not what {directory} was trained with; set it back (the checkpoint holds {name}), or "
                "begin a run with another train.output_dir"
            )
    if there.train.steps != config.train.steps:
        told.append(_told_steps(there, config, read_progress(directory).step))
    return [line for line in told if line]


def _is_same(directory: Path, files: Mapping[str, Entry], name: str, source: Asset) -> bool:
    """Whether an asset is what the checkpoint has of it; its weights, where it is a module."""
    if isinstance(source, Path) and source.is_file():
        return name in files and files[name] == hash_file(source)
    if not callable(source):
        return True
    with tempfile.TemporaryDirectory() as folder:
        source(Path(folder) / name)
        for path in sorted((Path(folder) / name).glob("*.safetensors")):
            saved = directory / name / path.name
            if not saved.is_file():
                return False
            ours, theirs = load_file(path), load_file(saved)
            if ours.keys() != theirs.keys() or not all(torch.equal(ours[key], theirs[key]) for key in ours):
                return False
    return True


def _told_steps(there: RunConfig, here: RunConfig, step: int) -> str:
    """What another number of steps does to the learning rate."""
    steps = (there.train.steps, here.train.steps)
    line = f"train.steps was {steps[0]} and is {steps[1]}"
    if step >= steps[1]:
        return f"{line}: the run is at step {step}, and nothing is left to train"
    now = learning_rate(step, here.optimizer.lr, here.schedule, steps[1])
    before = learning_rate(min(step, steps[0] - 1), there.optimizer.lr, there.schedule, steps[0])
    was = "would have been" if step < steps[0] else "ended at"
    return (
        f"{line}: the {here.schedule.kind} schedule is laid over all {steps[1]} steps; the learning rate of the next "
        f"step is {now:.2e}, it {was} {before:.2e}"
    )
