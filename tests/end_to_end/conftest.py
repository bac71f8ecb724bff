"""Data for all launches of a session, and launches that never outlive their test module."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from tests.end_to_end.dataset import write_data
from tests.end_to_end.launches import Launch, launcher
from tests.ranks import Ended, run_alone

Start = Callable[..., Launch]


def run_commands(cases: Sequence[tuple[Sequence[object], str]], folder: Path) -> list[Ended]:
    """One process of the trainer after another, each (arguments, accident of `commands` or "")."""
    described = [
        {"arguments": [*map(str, arguments)], "accident": accident, "log": str(folder / f"{number}.log")}
        for number, (arguments, accident) in enumerate(cases)
    ]
    (folder / "cases.json").write_text(json.dumps(described))
    done = run_alone("tests.end_to_end.commands", folder / "cases.json", log=folder / "commands.log")
    assert done.status == 0, done.output
    statuses = json.loads(done.output.splitlines()[-1])
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
