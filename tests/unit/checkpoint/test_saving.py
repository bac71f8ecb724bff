"""A save that cannot be written: one line, and what was saved before stays."""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_gemini.checkpoint import directory, load
from megatron_gemini.checkpoint import save as saving
from megatron_gemini.checkpoint.forecast import checkpoint_bytes, forecast
from megatron_gemini.checkpoint.publish import recover
from megatron_gemini.checkpoint.run_state import RunState
from megatron_gemini.checkpoint.save import ROLES, SaveError, save
from megatron_gemini.contracts import TokenLayout
from tests.tiny_checkpoint import CONFIG
from tests.unit.checkpoint.killing import kill_at
from tests.unit.checkpoint.still_engine import StillEngine


@pytest.fixture(scope="module")
def engine() -> StillEngine:
    return StillEngine(CONFIG, TokenLayout(300, (("image", 12),)))


def full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "some file")


def test_roles_that_are_not_readable_are_one_line(engine: StillEngine, tmp_path: Path) -> None:
    for content in ("[1]", "{", "3"):
        (tmp_path / ROLES).write_text(content)
        with pytest.raises(ValueError, match=r"roles\.json is not readable: .*; the checkpoint is damaged$"):
            load._check_origins(engine, tmp_path)


@pytest.mark.parametrize(
    ("module", "name", "stub"),
    [
        (saving, "write_tensors", full),
        (saving, "write_text", full),
        (saving, "seal", full),
        (saving.shutil, "copyfile", full),
        (os, "replace", full),
        (os, "mkdir", full),
    ],
)
def test_a_full_disk_is_one_line_and_the_checkpoint_before_stays(
    module: object, name: str, stub: object, engine: StillEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (asset := tmp_path / "text.model").write_bytes(b"model")
    before = save(engine, tmp_path, progress := RunState(step=1), {"text.model": asset}, keep=1)
    with monkeypatch.context() as patch:
        patch.setattr(module, name, stub)
        progress.step = 2
        with pytest.raises(SaveError, match=r"cannot write .*step-00000002: .*No space left on device.*; ") as error:
            save(engine, tmp_path, progress, {"text.model": asset}, keep=1)
    assert "\n" not in str(error.value)
    assert directory.newest(tmp_path).path == before
    directory.verify(before)
    after = save(engine, tmp_path, progress, {"text.model": asset}, keep=1)
    assert directory.newest(tmp_path).path == after
    assert sorted(path.name for path in after.parent.iterdir()) == ["latest", "step-00000002"]


class TwoRanks(StillEngine):
    """Rank 0 of two; what the other one says is given."""

    others: list[str]

    def gather(self, value: Any) -> list[Any]:
        return [value, ([], self.others.pop(0))]


@pytest.mark.parametrize("phase", [0, 1, 2])
def test_what_fails_on_another_rank_fails_here_and_leaves_nothing(phase: int, tmp_path: Path) -> None:
    two = TwoRanks(CONFIG, TokenLayout(300, (("image", 12),)))
    two.topology = dataclasses.replace(two.topology, world=2)
    two.others = [""] * phase + ["Input/output error"]
    with pytest.raises(SaveError, match=r"cannot write .*step-00000001: Input/output error on rank 1; ") as error:
        save(two, tmp_path, RunState(step=1), {}, keep=1)
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "checkpoints").glob(".step-*"))
    two.others = ["", "", ""]
    assert directory.newest(tmp_path).path == (None if phase < 2 else directory.step_directory(tmp_path, 1))
    directory.verify(save(two, tmp_path, RunState(step=2), {}, keep=1))


def test_frozen_weights_are_written_once_in_their_own_precision(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, engine=dataclasses.replace(CONFIG.engine, precision="bf16"))
    still = StillEngine(config, TokenLayout(300, (("image", 12),)))
    path = save(still, tmp_path, RunState(step=1), {}, keep=1)
    elements = sum(weight.numel() for weight in still.weights().values())
    assert 2 * elements < (path / "rank-00000.safetensors").stat().st_size < 3 * elements
    before = still.weights()
    with torch.no_grad():
        for parameter in still.frozen[0].module.parameters():
            parameter.zero_()
    load.load(still, path)
    assert all(torch.equal(weight, before[name]) for name, weight in still.weights().items())


def test_the_forecast_is_what_a_checkpoint_takes(
    engine: StillEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = checkpoint_bytes(engine)
    for free, told in ((3 * size, 0), (3 * size - 1, 1)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        assert len(forecast(engine, tmp_path / "not" / "there", keep=2)) == told
    path = save(engine, tmp_path, RunState(step=1), {}, keep=1)
    assert 0 < size < (path / "rank-00000.safetensors").stat().st_size < size + 16384
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2 * size))
    assert not forecast(engine, tmp_path, keep=2)  # one is there


def test_a_kill_anywhere_in_a_save_leaves_a_checkpoint_that_loads(
    engine: StillEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before any write, flush, rename or deletion: a start finds the checkpoint before, or the new one, to the bit."""
    weights = [part for name, part in engine.frozen[0].module.named_parameters() if part.ndim]
    begun = [weight.detach().clone() for weight in weights]
    progress = RunState(step=1)
    save(engine, template := tmp_path / "template", progress, {"text.model": "model"}, keep=1)
    number, killed, found = 0, True, set()
    try:
        while killed:
            number += 1
            run = shutil.copytree(template, tmp_path / f"{number}")
            with torch.no_grad():
                for weight, begin in zip(weights, begun, strict=True):
                    weight.copy_(begin + 1)  # what step 2 saves
            second = RunState(step=2, run=progress.run)
            act = partial(save, engine, run, second, {"text.model": "model"}, keep=1)
            killed = kill_at(number, monkeypatch, act)
            recover(run)
            path = directory.newest(run).path
            assert path is not None
            directory.verify(path)
            step = load.load(engine, path).step
            found.add(step)
            assert all(torch.equal(w, b + (step - 1)) for w, b in zip(weights, begun, strict=True))
            after = save(engine, run, RunState(step=3, run=progress.run), {"text.model": "model"}, keep=1)
            assert sorted(each.name for each in after.parent.iterdir()) == ["latest", "step-00000003"]
            shutil.rmtree(run)
    finally:
        with torch.no_grad():
            for weight, begin in zip(weights, begun, strict=True):
                weight.copy_(begin)
    assert found == {1, 2} and number > 20
