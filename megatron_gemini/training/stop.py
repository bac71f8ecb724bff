"""Stopping at a step boundary: Ctrl-C, SIGTERM, SIGUSR1, or a launcher that has gone.

A signal may reach one rank only, the launcher only, or everybody. Each rank just remembers it; the ranks agree in the
small all-reduce that begins every step, so that all of them save after the same step.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_LAUNCHERS = ("deepspeed", "torchrun", "torch.distributed", "torch/distributed")


class StopRequest:
    """Remembers what asked this process to stop. `install` takes over the signals until `restore`."""

    def __init__(self) -> None:
        self.reason = ""
        self.number = 0
        self._previous: dict[int, object] = {}
        self._launchers = list(launchers())

    def install(self) -> None:
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._remember)

    def restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._previous.clear()

    def requested(self) -> int:
        """The signal's number if this rank was asked to stop, else 0. A launcher that is gone counts as SIGTERM."""
        if not self.number and any(started(pid) != when for pid, when in self._launchers):
            self.number = signal.SIGTERM
        return self.number

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.number = self.number or number


def launchers() -> Iterator[tuple[int, str]]:
    """(process id, start time) of the launchers above this process: they may die without telling their ranks."""
    pid = os.getppid()
    while pid > 1:
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
            status = Path(f"/proc/{pid}/stat").read_text()
        except OSError:
            return
        if not any(name in command for name in _LAUNCHERS):
            return
        yield pid, started(pid)
        pid = int(status.rsplit(")", 1)[1].split()[1])


def started(pid: int) -> str:
    """Start time of a process in clock ticks, as /proc tells it; empty once it is gone or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return ""
    return "" if fields[0] == "Z" else fields[19]


class StoppedError(SystemExit):
    """Ends the process with the status that a shell gives a process ended by the signal."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
