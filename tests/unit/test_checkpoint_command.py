"""What is done with checkpoints on a disk, through the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_gemini.checkpoint import save as saving
from megatron_gemini.checkpoint.directory import complete_steps, step_directory
from megatron_gemini.checkpoint.inference import load_for_inference
from megatron_gemini.cli import main
from megatron_gemini.training.run_lock import RunLock
from tests.tiny_checkpoint import write_checkpoint


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    for step in (10, 20):
        write_checkpoint(folder, step, seed=step)
        state = {"step": step, "tokens": 0, "seconds": 0.0, "optimizer_steps": step, "moments_since": {}}
        (step_directory(folder, step) / "state.json").write_text(json.dumps(state))
        saving.seal(step_directory(folder, step), serial=step)
    return folder


def said(capsys: pytest.CaptureFixture[str], *arguments: object, status: int = 0) -> str:
    capsys.readouterr()
    assert main(["checkpoint", *map(str, arguments)]) == status
    found = capsys.readouterr()
    return found.err if status == 2 else found.out


def test_the_list_shows_what_a_run_goes_on_from(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = said(capsys, "list", run).splitlines()
    assert first.startswith("step-00000010 ") and second.startswith("step-00000020 ")
    assert "goes on from here" in second and "goes on from here" not in first


def test_whole_checkpoints_are_called_so(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"{step_directory(run, 20)} is whole: " in said(capsys, "verify", run)
    assert f"{step_directory(run, 10)} is whole: " in said(capsys, "verify", step_directory(run, 10))


def test_every_damaged_file_is_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damaged = [step_directory(run, 20) / name for name in ("rank-00000.safetensors", "text.model")]
    before = [path.read_bytes() for path in damaged]
    try:
        for path, content in zip(damaged, before, strict=True):
            path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert "(the hash differs): rank-00000.safetensors, text.model" in said(capsys, "verify", run, status=2)
        damaged[0].write_bytes(before[0][:-1])  # a copy that was cut off
        assert "rank-00000.safetensors is not what was saved" in said(capsys, "verify", run, status=2)
    finally:
        for path, content in zip(damaged, before, strict=True):
            path.write_bytes(content)


def test_the_difference_names_state_and_weights(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "the same settings, state and weights" in said(capsys, "diff", run, step_directory(run, 20))
    lines = said(capsys, "diff", step_directory(run, 10), run, status=1).splitlines()
    assert "state step: 10 -> 20" in lines and any(line.startswith("weight ") for line in lines)
    assert any("image_tokenizer/model.safetensors: differs" in line for line in lines)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_weights_in_one_file_are_a_model_that_answers(
    dtype: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "model"
    assert f"as {dtype} to {out}" in said(capsys, "weights", run, "--out", out, "--dtype", dtype)
    taken, trained = load_for_inference(out), load_for_inference(run)
    for (name, ours), theirs in zip(taken.model.named_parameters(), trained.model.parameters(), strict=True):
        assert torch.equal(ours, theirs.to(getattr(torch, dtype)).float()), name
    assert {tensor.dtype for tensor in load_file(out / "model.safetensors").values()} == {getattr(torch, dtype)}
    assert taken.image_tokenizer is not None and not list(out.glob("rank-*"))
    assert "is whole" in said(capsys, "verify", out)
    assert "is there already" in said(capsys, "weights", run, "--out", out, status=2)


def test_pruning_shows_first_and_spares_what_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (5, 10, 15, 20):
        directory = step_directory(tmp_path, step)
        directory.mkdir(parents=True)
        (directory / "config.yaml").write_text("")
        saving.seal(directory, RUN, serial=step)
    shown = said(capsys, "prune", tmp_path, "--keep", 1, "--every", 10)
    assert shown.count("would delete") == 2 and "2 stay" in shown and len(complete_steps(tmp_path)) == 4
    lock = RunLock(tmp_path)
    lock.take()
    try:
        assert "process" in said(capsys, "prune", tmp_path, "--keep", 1, "--yes", status=2)
    finally:
        lock.release()
    assert said(capsys, "prune", tmp_path, "--keep", 1, "--every", 10, "--yes").count("deleted") == 2
    assert [path.name for _, path in complete_steps(tmp_path)] == ["step-00000010", "step-00000020"]
    assert "nothing to delete" in said(capsys, "prune", tmp_path, "--keep", 1, "--every", 10, "--yes")


RUN = saving.RunState().run


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["lst"], "'lst' is nothing"),
        (["list", "/nowhere"], "/nowhere has no folder checkpoints"),
        (["verify", "/nowhere"], "/nowhere does not exist"),
        (["prune", "/nowhere"], "holds no complete checkpoint"),
        (["prune", "/nowhere", "--keep", "0"], "--keep is 0"),
        (["weights", "/nowhere"], "--out"),
        (["diff", "/nowhere", "/nowhere", "--deep"], "there is no option --deep"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], error: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = said(capsys, *arguments, status=2)
    assert error in found and found.count("\n") == 1
