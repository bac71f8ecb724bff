"""Training as a user starts it, in processes of its own: started, watched, signalled and, whatever happens, ended."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil

from tests.processes import HANGS_AFTER, alive, alive_at_last, wait_until

ROOT = Path(__file__).parents[2]
TRAIN = "megatron_gemini.train"


def launcher(kind: str, ranks: int = 2, module: str = TRAIN) -> list[str]:
    """The command before the trainer's own arguments. kind: deepspeed, torchrun or alone."""
    if kind == "deepspeed":
        command = ["deepspeed.launcher.runner", "--num_accelerators", str(ranks), "--master_port", str(free_port())]
        return [sys.executable, "-m", *command, "--module", module]
    if kind == "torchrun":
        command = ["torch.distributed.run", "--master-port", str(free_port()), "--nproc-per-node", str(ranks)]
        return [sys.executable, "-m", *command, "-m", module]
    return [sys.executable, "-m", module]


def free_port() -> int:
    """Below those that the system gives away: ranks import for seconds before they take theirs, and gloo takes many."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def environment() -> dict[str, str]:
    """Of every command: the CPU, one thread, this package, and no rank of its own."""
    ours = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "MPLBACKEND": "Agg"}
    inherited = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")}
    return {**inherited, **ours}


class Launch:
    """One command in a session of its own, with its output in a file."""

    def __init__(self, command: list[str], log: Path) -> None:
        self.log = log
        with log.open("w") as output:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment(),
                stdout=output,
                stderr=output,
                start_new_session=True,
                preexec_fn=_default_signals,
            )
        self.top = psutil.Process(self.process.pid)
        self.known: dict[int, psutil.Process] = {self.top.pid: self.top}

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def find(self, *words: str) -> psutil.Process:
        """The one process of this launch whose command line holds all of the words."""
        found = [process for process in self.processes() if all(word in process.cmdline() for word in words)]
        assert len(found) == 1, (words, found, self.output)
        return found[0]

    def processes(self) -> list[psutil.Process]:
        """All that run, the top one first; those that lost their parent are known from an earlier look."""
        if self.top.is_running():
            for process in self.top.children(recursive=True):
                self.known.setdefault(process.pid, process)
        return [process for process in self.known.values() if alive(process)]

    def ranks(self) -> list[psutil.Process]:
        """The processes that train, by rank."""
        trainers = [process for process in self.processes() if "RANK" in _environment(process)]
        return sorted(trainers, key=lambda process: int(_environment(process)["RANK"]))

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Wait for something that the running command does."""

        def ended_or_holds() -> bool:
            self.processes()
            return self.process.poll() is not None or condition()

        assert wait_until(ended_or_holds), f"nothing within {HANGS_AFTER} s:\n{self.output}"
        assert condition(), f"ended with {self.process.returncode}:\n{self.output}"

    def signal_group(self, number: int) -> None:
        """As a terminal does at Ctrl-C: to all that share the command's process group."""
        os.killpg(self.process.pid, number)

    def wait(self) -> int:
        """Exit status of the command, once no process of it is left."""
        try:
            status = self.process.wait(HANGS_AFTER)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {HANGS_AFTER} s:\n{self.output}") from None
        left = alive_at_last(self.processes())
        assert not left, f"{left} left after {HANGS_AFTER} s:\n{self.output}"
        return status

    def end(self) -> None:
        """Kill what is left of it."""
        for process in self.processes():
            process.send_signal(signal.SIGKILL)
        self.process.wait()


def _default_signals() -> None:
    """As in a terminal: what nohup, or a shell in the background, ignores would stay ignored in every child."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def _environment(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except psutil.Error:
        return {}
