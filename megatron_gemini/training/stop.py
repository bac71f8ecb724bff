"""Stopping at a step boundary: Ctrl-C, SIGTERM, SIGUSR1, a closed terminal, a launcher that has gone, or a file.

A signal may reach one rank only, the launcher only, or everybody. Each rank just remembers it; the ranks agree in the
small all-gather that begins every step, so that all of them save after the same step.

The file `stop` in the run's folder does the same, for those who reach the disk and no process. Rank 0 looks for it once
a step. It removes the file when all have saved.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
LAUNCHER_GONE, FILE_THERE = 256, 257  # stand where a signal's number stands
NAME = "stop"
_LAUNCHERS = {
    *("deepspeed", "deepspeed.launcher.runner", "deepspeed.launcher.launch"),
    *("torchrun", "torch.distributed.run", "torch.distributed.launch"),
}


class StopRequest:
    """Remembers what asked this process to stop. `install` takes over the signals until `restore`.

    run: the folder in which this process looks for the file; None looks for none.
    """

    def __init__(self, run: Path | None = None) -> None:
        self.number = 0
        self._file = run / NAME if run is not None else None
        self._previous: dict[int, object] = {}
        self._launchers = list(launchers())

    def install(self) -> None:
        for number in SIGNALS:
            if number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
                continue  # started with nohup
            self._previous[number] = signal.signal(number, self._remember)

    def restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._previous.clear()

    def ignore(self) -> None:
        """Let nothing disturb the way out: the launcher ends every rank as soon as it sees that one has ended."""
        for number in self._previous:
            signal.signal(number, signal.SIG_IGN)
        self._previous.clear()

    def requested(self) -> int:
        """The signal's number if this rank was asked to stop, `LAUNCHER_GONE` if nobody is left to ask, `FILE_THERE`
        for the file, else 0."""
        if not self.number and any(started(pid) != when for pid, when in self._launchers):
            self.number = LAUNCHER_GONE
        if not self.number and self._file is not None and self._file.exists():
            self.number = FILE_THERE
        return self.number

    def forget_file(self) -> None:
        """Remove the file: the next start goes on."""
        if self._file is not None:
            self._file.unlink(missing_ok=True)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.number = self.number or number  # the first: a launcher may answer one by sending another


def reason(number: int) -> str:
    """What `StopRequest.requested` found, in words that follow "stopped by"."""
    others = {LAUNCHER_GONE: "the end of its launcher", FILE_THERE: f"the file {NAME} in its folder"}
    return others[number] if number in others else signal.Signals(number).name


def launchers() -> Iterator[tuple[int, str]]:
    """(process id, start time) of the launchers above this process: they may die without telling their ranks."""
    pid = os.getppid()
    while pid > 1:
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
            status = Path(f"/proc/{pid}/stat").read_text()
        except OSError:
            return
        if not is_launcher(command.split("\0")):
            return
        yield pid, started(pid)
        # Behind the name, which is in parentheses and may hold spaces and parentheses: state, parent and so on.
        pid = int(status.rsplit(")", 1)[1].split()[1])


def is_launcher(command: list[str]) -> bool:
    """Whether a command line starts DeepSpeed's or torch's launcher: as a script, or as a module after Python's `-m`.

    A user's own `deepspeed_job.sh` around it is none: it may end as it likes.
    """
    first, *rest = command
    while first and rest and rest[0].startswith("-") and rest[0] != "-m":  # Python's options
        rest = rest[1:]
    script = rest[1:2] if rest[:1] == ["-m"] else rest[:1]
    return any(Path(name).name in _LAUNCHERS for name in [first, *script])


def started(pid: int) -> str:
    """Start time of a process in clock ticks, as /proc tells it; empty once it is gone or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return ""
    # Field 22 of proc(5), without the first two. The process id alone may by now be that of another process.
    return "" if fields[0] == "Z" else fields[19]


class StoppedError(SystemExit):
    """Ends the process with the status that a shell gives a process ended by the signal."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + (signal.SIGTERM if number in (LAUNCHER_GONE, FILE_THERE) else number))
