"""One run at a time in a folder: two would delete each other's checkpoints and records.

The lock is a file that names its holder: machine, process and when that began. On one machine the holder is looked up,
so a dead one's lock is taken over at once. On another machine its process cannot be seen. The holder sets the file's
time every `REFRESH` seconds, and is taken for dead `DEAD` seconds after its last sign.

On a network file system this holds as far as the file system does. `flock` closes the moment between looking and taking
where it is supported. Where it is not, two processes that take the same dead lock at once may both go on. A holder that
was paused for longer than `DEAD` may lose its lock. Both find out before their next save, which is refused.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import socket
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from megatron_gemini.engine.synchronize import raise_together
from megatron_gemini.parallel.topology import Topology
from megatron_gemini.training.stop import started

NAME = "run.lock"
REFRESH, DEAD = 10.0, 120.0
MAX_BYTES = 4096


@dataclass(frozen=True)
class Holder:
    """host: for people. machine: tells one boot and one space of process ids from all others. started: of the process,
    as /proc tells it. token: random, of this lock."""

    host: str
    pid: int
    machine: str
    started: str
    token: str

    @staticmethod
    def here() -> Holder:
        machine = ""
        with contextlib.suppress(OSError):  # containers of one machine have its boot, and may have its host name
            boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
            machine = f"{boot} {os.readlink('/proc/self/ns/pid')}"
        return Holder(socket.gethostname(), os.getpid(), machine, started(os.getpid()), secrets.token_hex(8))

    def told(self) -> str:
        return f"process {self.pid} on {self.host}"


class RunLock:
    """A run folder's lock, held from `take` to `release`."""

    def __init__(self, run: Path) -> None:
        self.run, self.path, self.holder = run, run / NAME, Holder.here()
        self._ended = threading.Event()

    def take(self) -> None:
        """Raises ValueError that names who has the lock, or why the folder cannot be written to."""
        try:
            self.run.mkdir(parents=True, exist_ok=True)
            with self._opened() as file:
                self._refuse_if_held(file)
                os.ftruncate(file, 0)
                os.pwrite(file, json.dumps(asdict(self.holder)).encode(), 0)
                os.fsync(file)
        except OSError as error:
            raise ValueError(
                f"cannot write into {self.run}: {error.strerror or error}; give another train.output_dir"
            ) from error
        threading.Thread(target=self._refresh, daemon=True, name="run lock").start()

    def check(self) -> None:
        """Raise ValueError if another process has taken the lock meanwhile: it writes here now."""
        other = None
        with contextlib.suppress(OSError):
            other = _read(self.path.read_bytes()[:MAX_BYTES])
        if other != self.holder:
            who = f"{other.told()} has taken it" if other else f"{self.path} is gone"
            raise ValueError(f"this run has lost its folder {self.run}: {who}; it ends without saving")

    def release(self) -> None:
        """Leave the folder to others; nothing happens if it was lost."""
        self._ended.set()
        with contextlib.suppress(OSError), self._opened() as file:
            if _read(os.pread(file, MAX_BYTES, 0)) == self.holder:
                self.path.unlink()

    @contextlib.contextmanager
    def _opened(self) -> Iterator[int]:
        """The file, which nobody else reads or changes meanwhile."""
        while True:
            # Not through a link, which could lead to a file of somebody else.
            file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
            try:
                with contextlib.suppress(OSError):  # not on every file system, see the top of this file
                    fcntl.flock(file, fcntl.LOCK_EX)
                try:
                    same = os.path.samestat(os.fstat(file), os.stat(self.path))
                except FileNotFoundError:  # its holder has just released, and so deleted it
                    same = False
                if same:
                    yield file
                    return
            finally:
                os.close(file)

    def _refuse_if_held(self, file: int) -> None:
        content = os.pread(file, MAX_BYTES, 0)
        if not content:
            return
        other = _read(content)
        if other is not None and other.started and other.machine == self.holder.machine:
            if started(other.pid) == other.started:
                raise ValueError(f"{self._held(other)}; wait until it has ended, or give another train.output_dir")
            return
        silent = self._now() - os.fstat(file).st_mtime
        if silent < DEAD:
            raise ValueError(
                f"{self._held(other)}, which gave its last sign {max(silent, 0):.0f} s ago; wait until it has ended, "
                f"give another train.output_dir, or try again {DEAD:.0f} s after the last sign of one that is gone"
            )

    def _held(self, other: Holder | None) -> str:
        return f"{self.run} is in use by {other.told() if other else f'what has written {self.path}'}"

    def _now(self) -> float:
        """Of the file system's clock: that of another machine may differ from this one's."""
        probe = self.path.with_name(f".{NAME}.{self.holder.token}")
        probe.touch(exist_ok=False)
        try:
            return probe.stat().st_mtime
        finally:
            probe.unlink()

    def _refresh(self) -> None:
        while not self._ended.wait(REFRESH):
            with contextlib.suppress(OSError):  # a hiccup of the storage; `check` tells a lock that is lost
                os.utime(self.path)


def _read(content: bytes) -> Holder | None:
    """None for what no lock has written."""
    with contextlib.suppress(ValueError, TypeError, RecursionError):
        found = Holder(**json.loads(content))
        texts = (found.host, found.machine, found.started, found.token)
        if type(found.pid) is int and all(isinstance(text, str) and text.isprintable() for text in texts):
            return found
    return None


@contextlib.contextmanager
def locked(run: Path, topology: Topology, device: torch.device) -> Iterator[RunLock | None]:
    """Hold the run's folder for the job: rank 0 has the lock, and where it is refused all ranks raise the same error.

    Gives the lock on rank 0, None on the others.
    """
    lock, problem = RunLock(run) if topology.rank == 0 else None, ""
    if lock is not None:
        try:
            lock.take()
        except ValueError as error:
            problem, lock = str(error), None
    try:
        raise_together(problem, topology, device)
        yield lock
    finally:
        if lock is not None:
            lock.release()
