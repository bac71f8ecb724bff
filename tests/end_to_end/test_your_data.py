"""The smallest recipe, as its header says it, from a folder of pictures to a question asked; with fewer steps."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.end_to_end.launches import ROOT, environment
from tests.unit.building.pictures import smooth

RECIPE = ROOT / "examples/your_data/run.yaml"
PROGRAMS = {"python": [sys.executable], "megatron-gemini": [sys.executable, "-m", "megatron_gemini.cli"]}
THINGS = ("cat", "dog", "house", "tree", "boat", "lamp")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where a user stands: the project's files, and photos/ with a text beside each picture."""
    for name in ("tools", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(40):
        name = "cat" if number == 0 else f"{number:03d}"
        smooth(number, 48).save(photos / f"{name}.jpg")
        (photos / f"{name}.txt").write_text(f"a {THINGS[number % 6]} beside a {THINGS[number % 5]}\n")
    (photos / "logo.svg").write_text("<svg/>")
    return tmp_path


def test_every_command_of_the_recipe_works_in_its_order(folder: Path) -> None:
    commands = re.findall(r"^# command:  (.*)$", RECIPE.read_text(), re.M)
    assert [command.split()[1].removeprefix("tools/") for command in commands] == [
        "build_shards.py",
        "train_sentencepiece.py",
        "train",
        "generate",
    ]
    outputs = []
    for command in commands:
        program, *arguments = shlex.split(command)
        if arguments[0] == "train":
            arguments += ["--train.steps", "4", "--train.validation_every", "2", "--schedule.warmup_steps", "1"]
        done = subprocess.run(
            [*PROGRAMS[program], *arguments],
            cwd=folder,
            env={**environment(), "PYTHONPATH": os.fspath(ROOT)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        outputs.append(done.stdout)
    assert "passed over" in outputs[0] and "1 .svg" in outputs[0]
    report = json.loads((folder / "runs/your_data/shards/report.json").read_text())
    assert 0 < report["held_out"] < report["kept"] == 40
    records = [json.loads(line) for line in (folder / "runs/your_data/metrics.jsonl").read_text().splitlines()]
    assert any(record.get("validation_loss") for record in records)
    assert outputs[3].strip(), "it answers, whatever that is after four steps"
