"""Data for all launches of a session, and launches that never outlive their test module."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.end_to_end.dataset import write_data
from tests.end_to_end.launches import ROOT, Launch, environment, launcher

Start = Callable[..., Launch]


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    status: int
    output: str


def run_commands(cases: Sequence[tuple[Sequence[object], str]], folder: Path) -> list[Ended]:
    """One process of the trainer after another, each (arguments, accident of `commands` or "")."""
    described = [
        {"arguments": [*map(str, arguments)], "accident": accident, "log": str(folder / f"{number}.log")}
        for number, (arguments, accident) in enumerate(cases)
    ]
    (folder / "cases.json").write_text(json.dumps(described))
    command = [sys.executable, "-m", "tests.end_to_end.commands", str(folder / "cases.json")]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    statuses = json.loads(done.stdout.splitlines()[-1])
    return [Ended(status, Path(str(case["log"])).read_text()) for status, case in zip(statuses, described, strict=True)]


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of `dataset.write_data`."""
    return write_data(tmp_path_factory.mktemp("end_to_end"))


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """start(kind, *arguments, ranks=2): a running `Launch` of the trainer."""
    folder = tmp_path_factory.mktemp("output")
    launches: list[Launch] = []

    def begin(kind: str, *arguments: object, ranks: int = 2) -> Launch:
        command = [*launcher(kind, ranks), *map(str, arguments)]
        launches.append(Launch(command, folder / f"{len(launches)}.log"))
        return launches[-1]

    yield begin
    for launch in launches:
        launch.end()
