"""Whole runs of the real command in one process: what they write, leave out, and how they survive accidents."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_gemini.checkpoint.pieces import PieceReader
from tests.end_to_end.conftest import run_commands
from tests.end_to_end.dataset import settings, write_config, write_tar
from tests.ranks import Ended

ENGINES: dict[str, list[Any]] = {
    "zero 0": ["--engine.zero_stage", 0, "--engine.offload_optimizer", "none"],
    "zero 1": ["--engine.zero_stage", 1, "--engine.offload_optimizer", "none"],
    "zero 2, offloaded": ["--engine.zero_stage", 2],
    "zero 3": ["--engine.offload_optimizer", "none"],
    "zero 3, all offloaded": ["--engine.offload_parameters", "cpu"],
    "bf16": ["--engine.precision", "bf16"],
}
OFTEN = ["--train.steps", 6, "--train.save_every", 2, "--train.keep", 2, "--logging.every", 3]
UNFROZEN = ["--config", "{folder}/taken.yaml", "--encoders.vision.no_frozen", "--train.keep", 9]
# name: (arguments, accident)
RUNS: dict[str, tuple[list[Any], str]] = {
    **{name: (arguments, "") for name, arguments in ENGINES.items()},
    "often": ([*OFTEN, "--train.validation_every", 2, "--train.validation_rows", 1], ""),
    "bad samples": (["--data.sources.0.shards", "{folder}/some_bad.tar", "--train.steps", 6], ""),
    "bad images": (["--config", "{folder}/images.yaml"], ""),
    "signalled": (["--train.save_every", 2, "--train.steps", 8], "signal_in_save"),
    "signalled, again": (["--train.save_every", 2, "--train.steps", 8], ""),
    "killed": (["--train.save_every", 2, "--train.steps", 8], "kill_in_second_save"),
    "killed, again": (["--train.save_every", 2, "--train.steps", 8], ""),
    "undisturbed": (["--train.save_every", 2, "--train.steps", 8], ""),
    "taken": (["--config", "{folder}/taken.yaml"], ""),
    "taken, again": (["--config", "{folder}/taken.yaml", "--train.steps", 4], ""),
    "taken, unfrozen": ([*UNFROZEN, "--train.steps", 6, "--train.save_every", 1], ""),
    "taken, unfrozen, again": ([*UNFROZEN, "--train.steps", 8], ""),
    "anew": (["--train.save_every", 2, "--train.steps", 4], ""),
    "anew, again": (["--train.no_resume", "--train.save_every", 1, "--train.keep", 1], ""),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def runs(data: Path, folder: Path) -> dict[str, Ended]:
    """How every run of `RUNS` ended; its output directory is `folder` / name, without what follows ", again"."""
    sections = settings(data, folder / "default")
    config = write_config(folder / "run.yaml", sections)
    write_config(folder / "images.yaml", image_settings(folder))
    write_config(folder / "taken.yaml", taken_settings(data, folder))
    samples = {f"{number}": {"png": b"no image", "txt": b"one"} for number in range(2)}
    write_tar(folder / "some_bad.tar", samples | good_images(data))
    write_tar(folder / "images.tar", {"bad": {"png": b"no image"}} | good_images(data))
    cases = []
    for name, (given, accident) in RUNS.items():
        words = [str(word).format(folder=folder) for word in given]
        ours = [] if "--config" in words else ["--config", str(config)]
        output = folder / name.removesuffix(", again").removesuffix(", unfrozen")
        cases.append(([*ours, *words, "--train.output_dir", output], accident))
    return dict(zip(RUNS, run_commands(cases, folder), strict=True))


def image_settings(folder: Path) -> dict[str, Any]:
    """Training of the image tokenizer, where every epoch meets the bad image again."""
    return {
        "image_tokenizer": {"width": 16, "layers": 1, "heads": 2, "mlp_width": 24, "image_size": 8, "codes": 12},
        "data": {"sources": [{"shards": str(folder / "images.tar")}]},
        "schedule": {"warmup_steps": 1},
        "objective": {"kind": "image_tokenizer", "images_per_step": 12},
        "train": {"steps": 6},
        "logging": {"tensorboard": False},
    }


def taken_settings(data: Path, folder: Path) -> dict[str, Any]:
    """The vision encoder of the run "zero 0", frozen, with a new connector to a decoder of another size."""
    sections = settings(data, folder / "default")
    sections["model"] |= {"width": 48, "layers": 1}
    sections["encoders"]["vision"]["frozen"] = True
    sections["init_from"] = [{"checkpoint": str(folder / "zero 0"), "module": "encoders.vision"}]
    return sections


def good_images(data: Path) -> dict[str, dict[str, bytes]]:
    from megatron_gemini.data.sources.shards import Shards

    shards = Shards([str(data / "digits.tar")])
    return {f"good{number}": shards.read(number, ["png", "txt"]) for number in range(12)}


def records(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def curve(output: Path) -> list[tuple[int, str]]:
    return [(record["step"], float(record["loss"]).hex()) for record in records(output)]


def checkpoints(output: Path) -> list[str]:
    return sorted(path.name for path in (output / "checkpoints").iterdir())


@pytest.mark.parametrize("name", [name for name in RUNS if name not in ("signalled", "killed")])
def test_the_run_ends_well_and_says_nothing_odd(name: str, runs: dict[str, Ended]) -> None:
    assert runs[name].status == 0, runs[name].output
    for word in ("Warning", "WARNING", "Traceback", "rror"):
        assert word not in runs[name].output, runs[name].output


@pytest.mark.parametrize("name", ENGINES)
def test_every_engine_has_the_same_losses(name: str, runs: dict[str, Ended], folder: Path) -> None:
    assert runs[name].status == 0, runs[name].output
    found = [record["loss"] for record in records(folder / name)]
    expected = [record["loss"] for record in records(folder / "zero 0")]
    assert len(found) == 3
    tolerance = 2e-2 if name == "bf16" else 1e-5
    assert found == pytest.approx(expected, rel=tolerance, abs=0)


def test_intervals_are_kept(runs: dict[str, Ended], folder: Path) -> None:
    assert runs["often"].status == 0, runs["often"].output
    found = records(folder / "often")
    assert [record["step"] for record in found] == [
        1,
        2,
        3,
        4,
        6,
    ]  # the first, every third, those with validation losses
    validation = [record["step"] for record in found if math.isfinite(record.get("validation_loss", math.nan))]
    assert validation == [2, 4, 6]
    assert checkpoints(folder / "often") == ["latest", "step-00000004", "step-00000006"]
    assert json.loads((folder / "often" / "summary.json").read_text())["steps"] == 6


def test_a_frozen_encoder_that_was_taken_from_another_run_stays_as_it_was(runs: dict[str, Ended], folder: Path) -> None:
    steps = [folder / "zero 0" / "checkpoints" / "step-00000003", folder / "taken" / "checkpoints" / "step-00000004"]
    before, after = (PieceReader(step) for step in steps)
    vision = [name for name in after.names() if name.startswith("encoders.vision.")]
    assert vision and all(torch.equal(before.weight(name), after.weight(name)) for name in vision)
    assert after.shape("connectors.vision.projection.weight") == (48, 16)
    elements = sum(before.weight(name).numel() for name in vision)
    assert f"initialized encoders.vision ({elements:,} parameters) from {steps[0]}\n" in runs["taken"].output
    again = runs["taken, again"].output
    assert "going on from" in again and "init_from was for the beginning" in again and "initialized" not in again


def test_an_encoder_that_is_unfrozen_begins_with_fresh_moments(runs: dict[str, Ended], folder: Path) -> None:
    unfrozen, again = runs["taken, unfrozen"], runs["taken, unfrozen, again"]
    assert unfrozen.status == again.status == 0, unfrozen.output + again.output
    vision = [n for n in PieceReader(folder / "taken/checkpoints/step-00000008").names() if "encoders.vision." in n]
    assert f"encoders.vision ({len(vision)} parameters): frozen until now" in unfrozen.output
    assert "settings that have changed: encoders.vision.frozen True -> False" in unfrozen.output
    assert "frozen until now" not in again.output
    before, after = (PieceReader(folder / "taken/checkpoints" / step) for step in ("step-00000006", "step-00000008"))
    assert all(before.has("exp_avg", name) for name in vision)
    assert not all(torch.equal(before.weight(name), after.weight(name)) for name in vision)


def test_bad_samples_are_counted_and_shown(runs: dict[str, Ended], folder: Path) -> None:
    assert runs["bad samples"].status == 0, runs["bad samples"].output
    counts = [record["skipped_samples"] for record in records(folder / "bad samples")]
    assert 0 < counts[-1] >= counts[0]
    assert "samples skipped" in runs["bad samples"].output
    assert "that could not be used:\n  caption:some_bad.tar  " in runs["bad samples"].output
    assert all(record["skipped_samples"] == 0 for record in records(folder / "often"))


def test_a_bad_image_is_counted_and_shown_in_every_epoch(runs: dict[str, Ended], folder: Path) -> None:
    counts = [record["skipped_samples"] for record in records(folder / "bad images")]
    assert counts[-1] >= 5  # six steps of 12 images go through 13 images more than five times
    assert "samples that could not be used:\n  images  " in runs["bad images"].output


def test_signals_in_a_save_leave_it_whole(runs: dict[str, Ended], folder: Path) -> None:
    ended = runs["signalled"]
    assert ended.status == 143, ended.output
    assert "stopped by SIGTERM after step 2; saved" in ended.output.splitlines()[-1]
    assert ended.output.count("saved") == 2  # after the save, and in the last line
    assert "going on from" in runs["signalled, again"].output
    assert curve(folder / "signalled") == curve(folder / "undisturbed")


def test_a_kill_in_a_save_leaves_the_checkpoint_before(runs: dict[str, Ended], folder: Path) -> None:
    assert runs["killed"].status == -9
    assert "going on from" in runs["killed, again"].output
    assert "step-00000002\n" in runs["killed, again"].output
    assert curve(folder / "killed") == curve(folder / "undisturbed")
    assert checkpoints(folder / "killed") == ["latest", "step-00000006", "step-00000008"]  # nothing half-written


def test_a_run_begun_anew_keeps_its_own_checkpoints(runs: dict[str, Ended], folder: Path) -> None:
    assert checkpoints(folder / "anew") == ["latest", "step-00000003", "step-00000004"]
    assert (folder / "anew" / "checkpoints" / "latest").read_text().strip() == "step-00000003"
    assert "going on" not in runs["anew, again"].output
