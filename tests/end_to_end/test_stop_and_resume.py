"""A run that is stopped in any way saves at a step boundary and goes on to the bit.

One run is stopped again and again, each time in another way, and each time the same command goes on with it. In the end
its metrics.jsonl must hold what an uninterrupted run's does, every step once.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.end_to_end.conftest import Start
from tests.end_to_end.dataset import settings, write_config
from tests.end_to_end.launches import STOPS_WITHIN, Launch

STEPS = 120
RUNNER, LAUNCH = "deepspeed.launcher.runner", "deepspeed.launcher.launch"


@dataclass(frozen=True)
class Stop:
    """How a run is stopped. target: the terminal, a launcher, or a rank. status: of the command's."""

    launcher: str
    target: str
    number: signal.Signals
    told_as: signal.Signals
    status: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.launcher}-{self.target}-{self.number.name}"

    def send(self, launch: Launch) -> None:
        if self.target == "terminal":
            launch.signal_group(self.number)
        elif self.target.startswith("rank"):
            launch.ranks()[int(self.target[4:])].send_signal(self.number)
        elif self.target == "launch.py":
            launch.find(LAUNCH).send_signal(self.number)
        else:
            launch.process.send_signal(self.number)


INT, TERM, USR1 = signal.SIGINT, signal.SIGTERM, signal.SIGUSR1
# DeepSpeed's runner lets Ctrl-C end it as Python does (-2), and dies of SIGTERM (-15) without telling anybody.
SHORT = [
    Stop("deepspeed", "terminal", INT, INT, (1, -2, 130)),
    Stop("deepspeed", "command", TERM, TERM, (-15,)),
    Stop("torchrun", "command", TERM, TERM, (1, -15, 143)),
]
LONG = [
    Stop("deepspeed", "launch.py", TERM, TERM, (1,)),
    Stop("deepspeed", "rank0", TERM, TERM, (143,)),
    Stop("deepspeed", "rank1", TERM, TERM, (143,)),
    Stop("deepspeed", "rank1", USR1, USR1, (138,)),
    Stop("deepspeed", "launch.py", signal.SIGKILL, TERM, (-9, 0, 247)),
    Stop("torchrun", "terminal", INT, INT, (1, -2, 130)),
    Stop("torchrun", "command", USR1, TERM, (-10,)),
    Stop("torchrun", "rank1", TERM, TERM, (1,)),
]


class Chain:
    """One run directory, and how far the run in it has come."""

    def __init__(self, start: Start, config: Path, output: Path) -> None:
        self.start, self.output = start, output
        self.arguments = ["--config", config, "--train.output_dir", output, "--train.steps", STEPS]

    def steps(self) -> int:
        path = self.output / "metrics.jsonl"
        return path.read_text().count("\n") if path.exists() else 0

    def saved(self) -> int:
        return int((self.output / "checkpoints" / "latest").read_text().removeprefix("step-"))

    def run(self, kind: str, until: int) -> Launch:
        """The command, started, and waited for until it has done the step."""
        launch = self.start(kind, *self.arguments)
        launch.wait_until(lambda: f"step {until}" in launch.output or self.steps() >= until)
        return launch

    def stop(self, how: Stop) -> None:
        before = self.saved() if self.steps() else 0
        launch = self.run(how.launcher, before + 3)
        assert before == 0 or f"going on from {self.output}/checkpoints/step-{before:08}" in launch.output
        how.send(launch)
        status = launch.wait(STOPS_WITHIN)
        assert launch.seconds_to_end < STOPS_WITHIN
        assert status in how.status, f"{status}\n{launch.output}"
        assert before < self.saved() < STEPS
        assert self.steps() == self.saved()
        said = f"stopped by {how.told_as.name} after step {self.saved()}; saved {self.output}/checkpoints/"
        assert launch.output.count(said) == 1, launch.output
        assert "the same command goes on from there" in launch.output
        assert "Traceback" not in trainers_part(launch.output), launch.output

    def finish(self, kind: str) -> None:
        assert self.start(kind, *self.arguments).wait() == 0


def trainers_part(output: str) -> str:
    """Without what the launchers say of their own end, which is theirs."""
    lines = output.splitlines()
    starts = [number for number, line in enumerate(lines) if line.startswith("Traceback")]
    for number in reversed(starts):
        end = next(
            (n for n in range(number + 1, len(lines)) if not lines[n].startswith((" ", "Traceback"))), len(lines)
        )
        block = lines[number:end]
        if any(launcher in line for line in block for launcher in ("deepspeed/launcher", "torch/distributed")):
            del lines[number:end]
    return "\n".join(lines)


def losses(output: Path) -> list[tuple[int, str]]:
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [(record["step"], float(record["loss"]).hex()) for record in records]


@pytest.fixture(scope="module")
def uninterrupted(start: Start, config: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    output = tmp_path_factory.mktemp("runs") / "uninterrupted"
    Chain(start, config, output).finish("deepspeed")
    return output


@pytest.fixture(scope="module")
def config(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stop")
    return write_config(folder / "run.yaml", settings(data, folder / "run"))


@pytest.mark.parametrize("stops", [SHORT, pytest.param(LONG, marks=pytest.mark.long)], ids=["short", "long"])
def test_a_stopped_run_goes_on_to_the_bit(
    stops: list[Stop], start: Start, config: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    chain = Chain(start, config, tmp_path / "run")
    for how in stops:
        chain.stop(how)
    chain.finish("deepspeed")
    assert losses(chain.output) == losses(uninterrupted)
    assert [step for step, _ in losses(uninterrupted)] == list(range(STEPS))
