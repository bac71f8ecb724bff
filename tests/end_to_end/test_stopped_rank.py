"""A rank that is stopped is named by the other, which does not wait for it for ever."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.end_to_end.dataset import settings, write_config
from tests.end_to_end.launches import ROOT, TRAIN, environment, free_port
from tests.processes import HANGS_AFTER, wait_until


@dataclass
class Pair:
    """Two ranks without a launcher, which would end one as soon as the other has ended."""

    ranks: list[subprocess.Popen[bytes]]
    log: Path
    metrics: Path

    def steps(self) -> int:
        return self.metrics.read_text().count("\n") if self.metrics.exists() else 0

    def wait_until_trained(self) -> None:
        wait_until(lambda: self.steps() >= 30 or any(rank.poll() is not None for rank in self.ranks))
        assert self.steps() >= 30, self.log.read_text()


@pytest.fixture
def pair(data: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Pair]:
    """Of a run without an end. param: its `train.rank_timeout`."""
    config = write_config(tmp_path / "run.yaml", settings(data, tmp_path / "run"))
    options = ["--train.steps", "1000000", "--train.rank_timeout", str(request.param), "--data.workers", "1"]
    job = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command, log, ranks = [sys.executable, "-m", TRAIN, "--config", str(config), *options], tmp_path / "log", []
    with log.open("w") as output:
        for rank in ("0", "1"):
            place = environment() | job | {"RANK": rank, "LOCAL_RANK": rank}
            ranks.append(subprocess.Popen(command, cwd=ROOT, env=place, stdout=output, stderr=output))
    yield Pair(ranks, log, tmp_path / "run" / "metrics.jsonl")
    for process in ranks:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("pair", "stopped", "asked"),
    [
        pytest.param(3, 1, None, id="within the set time"),
        # Rank 0 has the store, which then answers nobody.
        pytest.param(600, 0, signal.SIGTERM, id="when asked to stop", marks=pytest.mark.long),
    ],
    indirect=["pair"],
)
def test_a_rank_that_is_stopped_is_named_with_its_last_step(pair: Pair, stopped: int, asked: int | None) -> None:
    pair.wait_until_trained()
    other = pair.ranks[1 - stopped]
    os.kill(pair.ranks[stopped].pid, signal.SIGSTOP)
    if asked:
        time.sleep(0.5)  # the other now waits in a collective, where no handler of Python's runs
        other.send_signal(asked)
    assert other.wait(HANGS_AFTER) == 4, pair.log.read_text()
    said = [line for line in pair.log.read_text().splitlines() if "error" in line]
    assert len(said) == 1, pair.log.read_text()
    assert f"rank {stopped} (process {pair.ranks[stopped].pid} on " in said[0]
    assert "given no sign of life for" in said[0] and "; its last step was" in said[0]
    assert ("asked to stop by SIGTERM, but" in said[0]) == bool(asked)
