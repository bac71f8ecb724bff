"""The plugin of docs/extending.md in real runs: an encoder, two connectors, an objective, a task and a format at once.

Two steps on four ranks, saved, gone on with by one process, planned, and asked.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.conftest import run_commands
from tests.end_to_end.dataset import NAMES, settings, write_config
from tests.end_to_end.launches import TRAIN
from tests.ranks import Ended, run_alone, run_ranks

PLUGIN = ("--plugin", "tests.extension.plugin")
FRAMES = ("--plugin", "tests.end_to_end.frames")
STEPS, MORE = 2, 3


def sections(data: Path, folder: Path) -> dict[str, Any]:
    """Series through the halving connector, and images that a layer reads as a memory."""
    made = settings(data, folder / "run")
    made["encoders"]["audio"] = {"enabled": False}
    made["encoders"]["vision"]["connector"] = {"kind": "reading", "lr_scale": 0.5}
    made["encoders"]["series"] = {"enabled": True, "connector": {"kind": "halving"}}
    made["image_tokenizer"] = {"codes": 0}  # it reads, and draws nothing
    made["objective"] = {"kind": "scored", "sharpness": 0.5}
    made["data"]["sources"] = [
        {"shards": str(folder / "series.csv"), "task": "name_series"},
        {"shards": str(data / "digits.tar"), "task": "caption", "weight": 0.5},
    ]
    made["data"] |= {"row_tokens": 64, "validation": []}
    made["schedule"] = {"kind": "wsd", "warmup_steps": 1, "decay_steps": 0}  # the same, however long the run
    made["optimizer"] = {"lr": 1e-3, "eps": 1e-4}
    made["train"] |= {"rows_per_step": 4, "steps": MORE}
    made["parallel"] = {"tensor": 2, "pipeline": 2}
    made["engine"] = {"zero_stage": 3, "offload_optimizer": "none"}
    return made


def write_series(path: Path) -> None:
    lines = [f'"{list(range(1 + number, 9 + 2 * number))}",{NAMES[number]},{1 + number % 3}' for number in range(10)]
    path.write_text("\n".join(["series,text,score", *lines]) + "\n")


@pytest.fixture(scope="module")
def folder(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("extension")
    write_series(folder / "series.csv")
    write_config(folder / "run.yaml", sections(data, folder))
    (folder / "x.series.json").write_text("[1, 2, 3, 4, 5, 6, 7, 8, 9]")
    return folder


@pytest.fixture(scope="module")
def trained(folder: Path) -> Path:
    """The run after two steps on four ranks."""
    given = ("--config", folder / "run.yaml", *PLUGIN, "--train.steps", STEPS)
    ended = run_ranks(TRAIN, 4, *given, log=folder / "ranks.log")
    assert ended.status == 0, ended.output
    return folder / "run"


@pytest.fixture(scope="module")
def ended(folder: Path, trained: Path) -> dict[str, Ended]:
    """Commands on what the four ranks have left, by name."""
    config = ("--config", folder / "run.yaml")
    alone = ("--parallel.tensor", 1, "--parallel.pipeline", 1)
    os.environ["FRAMES"] = str(folder / "frames.json")
    cases: dict[str, tuple[object, ...]] = {
        "without the plugin": (*config, *alone),
        "a checkpoint without it": ("generate", "--checkpoint", trained, "what is this?"),
        "another objective": (*config, *alone, *PLUGIN, "--objective.kind", "pretrain"),
        "asked": ("generate", *PLUGIN, "--checkpoint", trained, "--series", folder / "x.series.json", "name"),
        "resumed": (*config, *alone, *PLUGIN, *FRAMES),
        "planned": ("plan", *config, *PLUGIN, "--gpus", 4, "--gpus_per_node", 4),
    }
    found = dict(zip(cases, run_commands([(case, "") for case in cases.values()], folder), strict=True))
    del os.environ["FRAMES"]
    return found


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_losses_on_four_ranks_and_after_the_resume_are_those_of_a_plain_loop(
    folder: Path, trained: Path, ended: dict[str, Ended]
) -> None:
    assert ended["resumed"].status == 0, ended["resumed"].output
    done = run_alone("tests.end_to_end.plain_loop", "--config", folder / "run.yaml", log=folder / "plain.log")
    assert done.status == 0, done.output
    expected = json.loads(done.output.splitlines()[-1])
    assert [record["loss"] for record in records(trained)] == pytest.approx(expected, rel=1e-5)
    assert len(expected) == MORE


def test_both_tasks_and_their_placeholders_were_trained_on(trained: Path, ended: dict[str, Ended]) -> None:
    newest = records(trained)[-1]
    assert any("name_series" in name for name in newest), newest
    assert any("caption" in name for name in newest), newest


@pytest.mark.parametrize("case", ["without the plugin", "a checkpoint without it", "another objective"])
def test_a_run_without_what_it_was_trained_with_is_refused_in_a_line(case: str, ended: dict[str, Ended]) -> None:
    assert ended[case].status == 2, ended[case].output
    lines = ended[case].output.splitlines()
    assert len(lines) == 1, lines


def test_it_is_planned(ended: dict[str, Ended]) -> None:
    assert ended["planned"].status == 0, ended["planned"].output
    assert "tensor" in ended["planned"].output


def test_it_answers(ended: dict[str, Ended]) -> None:
    assert ended["asked"].status == 0, ended["asked"].output


def test_five_functions_lie_between_the_command_and_the_model(folder: Path, ended: dict[str, Ended]) -> None:
    """So a stranger reads a step from top to bottom; what DeepSpeed and torch put between does not count."""
    calls = [tuple(call) for call in json.loads((folder / "frames.json").read_text())]
    assert len(calls) <= 5, calls
    assert calls[-1] == ("megatron_gemini.engine.zero", "forward")
