"""A run that is stopped in any way saves at a step boundary and goes on to the bit.

One run is stopped again and again, each time in another way, and each time the same command goes on with it. In the end
its metrics.jsonl must hold what an uninterrupted run's does, every step once.
"""

from __future__ import annotations

import json
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.end_to_end.conftest import Start
from tests.end_to_end.dataset import settings, write_config
from tests.end_to_end.launches import TRAIN, Launch
from tests.processes import HANGS_AFTER
from tests.ranks import run_ranks

STEPS = 120
RUNNER, LAUNCH = "deepspeed.launcher.runner", "deepspeed.launcher.launch"


@dataclass(frozen=True)
class Stop:
    """How a run is stopped. target: the terminal, a launcher, or a rank. status: of the command's."""

    launcher: str
    target: str
    number: signal.Signals
    told_as: str
    status: int

    def __str__(self) -> str:
        return f"{self.launcher}-{self.target}-{self.number.name}"

    def send(self, launch: Launch) -> None:
        if self.target.startswith("terminal"):
            launch.signal_group(self.number)
            if self.target.endswith("twice"):
                time.sleep(0.1)
                launch.signal_group(self.number)
        elif self.target.startswith("rank"):
            launch.ranks()[int(self.target[4:])].send_signal(self.number)
        elif self.target == "launch.py":
            launch.find(LAUNCH).send_signal(self.number)
        else:
            launch.process.send_signal(self.number)


INT, TERM, USR1, HUP, KILL = signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGKILL
GONE = "the end of its launcher"
# DeepSpeed's runner lets Ctrl-C end it as Python does (-2), dies of SIGTERM (-15) without telling anybody, and gives 0
# for a launch.py that was killed; torchrun gives 1 for whatever ended its ranks.
SHORT = [
    Stop("deepspeed", "terminal", INT, "SIGINT", -2),
    Stop("deepspeed", "command", TERM, GONE, -15),
    Stop("torchrun", "command", TERM, "SIGTERM", 1),
]
LONG = [
    Stop("deepspeed", "launch.py", TERM, "SIGTERM", 1),
    Stop("deepspeed", "rank0", TERM, "SIGTERM", 143),
    Stop("deepspeed", "rank1", TERM, "SIGTERM", 143),
    Stop("deepspeed", "rank1", USR1, "SIGUSR1", 138),
    Stop("deepspeed", "terminal", HUP, "SIGHUP", -1),
    Stop("deepspeed", "launch.py", KILL, GONE, 0),
    Stop("deepspeed", "terminal twice", INT, "SIGINT", -2),
    Stop("torchrun", "terminal", INT, "SIGINT", 1),
    Stop("torchrun", "command", USR1, GONE, -10),
    Stop("torchrun", "rank1", TERM, "SIGTERM", 1),
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

    def steps_when_asked(self, how: Stop, launch: Launch) -> int:
        """The steps that were made when every rank that was meant could know of it."""
        if how.told_as == GONE:
            launch.process.wait(HANGS_AFTER)
        # A launcher that passes a signal on does so in its own time, and the steps until then are not ours.
        return self.steps() if how.told_as == GONE or how.target.startswith(("terminal", "rank")) else STEPS

    def stop(self, how: Stop) -> None:
        before = self.saved() if self.steps() else 0
        launch = self.run(how.launcher, before + 3)
        if before:
            assert f"going on from {self.output}/checkpoints/step-{before:08}" in launch.output
        how.send(launch)
        asked = self.steps_when_asked(how, launch)
        assert launch.wait() == how.status, f"{how}\n{launch.output}"
        assert before < self.saved() == self.steps() < STEPS, how
        assert self.saved() <= asked + 2, how  # the step under way, and one that had agreed to be made
        said = (
            f"stopped by {how.told_as} after step {self.saved()}; "
            f"saved {self.output}/checkpoints/step-{self.saved():08}; the same command goes on from there"
        )
        trainers = [line for line in launch.output.splitlines() if line.startswith(("step", "saved", "stopped"))]
        assert trainers[-1] == said, launch.output
        assert "megatron_gemini/" not in launch.output, launch.output  # no traceback of ours

    def finish(self, kind: str) -> None:
        assert self.start(kind, *self.arguments).wait() == 0


def losses(output: Path) -> list[tuple[int, str]]:
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [(record["step"], float(record["loss"]).hex()) for record in records]


@pytest.fixture(scope="module")
def uninterrupted(start: Start, config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "uninterrupted"
    ended = run_ranks(TRAIN, 2, *Chain(start, config, output).arguments, log=output.with_suffix(".log"))
    assert ended.status == 0, ended.output
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
    assert [step for step, _ in losses(uninterrupted)] == list(range(1, STEPS + 1))
