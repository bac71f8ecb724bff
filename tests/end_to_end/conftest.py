"""Data for all launches of a session, and launches that never outlive their test module."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.end_to_end.dataset import write_data
from tests.end_to_end.launches import Launch, launcher

Start = Callable[..., Launch]


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
