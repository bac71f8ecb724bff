"""Notices a rank that gives no sign of life, while the others wait for it in a collective.

A process that is stopped, or whose machine is gone, closes no connection, and the others wait for half an hour. So each
rank leaves a sign in the job's store every few seconds, from a thread of its own, with the number of steps it has done.
Rank 0 looks at all of them and the others at rank 0. A rank that is silent for `train.rank_timeout` seconds is named,
and the rank that noticed ends; the launcher then ends the others.

A process that waits in a collective answers no signal either: Python's handlers run between two instructions of the
main thread. The thread here reads signals from a pipe, and after one it waits `AFTER_SIGNAL` seconds for a silent rank.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import NoReturn

import torch.distributed as dist

from megatron_gemini.engine.distributed import job_store, store_in_a_rank
from megatron_gemini.exit_status import RANK_LOST

AFTER_SIGNAL = 10.0
MOST_BETWEEN = 5.0  # seconds between two signs
TELLS_ALONE = 5.0  # seconds by which higher ranks tell the same later: the launcher ends them before
_DONE = "done"


@dataclass
class Sign:
    """What was heard of a rank. at: on this process's clock, when it last said something new."""

    said: str
    at: float


class Signs:
    """What this rank has heard of the others, and who is silent."""

    def __init__(self, ranks: Iterable[int], clock: Callable[[], float] = time.monotonic) -> None:
        self.clock, self.looked = clock, clock()
        self.latest = {rank: Sign("", self.looked) for rank in ranks}

    def hear(self, rank: int, said: str) -> None:
        """said: "BEATS STEPS WHERE", or that the rank is done and need not be heard again."""
        if said == _DONE:
            self.latest.pop(rank, None)
        elif rank in self.latest and said != self.latest[rank].said:
            self.latest[rank] = Sign(said, self.clock())

    def heard(self, rank: int) -> bool:
        """Whether the rank has ever said something."""
        return bool(self.latest[rank].said)

    def excuse(self) -> None:
        """Nobody could be heard just now, for a reason that is none of the ranks'."""
        for sign in list(self.latest.values()):
            sign.at = self.clock()

    def silent(self, seconds: float, usual: float) -> list[str]:
        """Who has said nothing new for so long, in words. usual: seconds since the last call, at most."""
        now = self.clock()
        # Where this process itself was stopped meanwhile, it could hear nobody.
        if now - self.looked > 3 * usual:
            self.excuse()
        self.looked = now
        return [
            _words(rank, sign, now - sign.at) for rank, sign in list(self.latest.items()) if now - sign.at > seconds
        ]


def _words(rank: int, sign: Sign, seconds: float) -> str:
    if not sign.said:
        return f"rank {rank} has given no sign of life for {seconds:.0f} s; it has not begun to train"
    _, steps, where = sign.said.split(" ", 2)
    return f"rank {rank} ({where}) has given no sign of life for {seconds:.0f} s; its last step was {steps}"


class RankWatch:
    """Watches from `start` to `close`. limit: seconds of silence; steps: how many this rank has done."""

    def __init__(self, rank: int, world: int, limit: float, steps: Callable[[], int], store: dist.Store) -> None:
        self.rank, self.limit, self.steps, self.store = rank, limit, steps, store
        self.signs = Signs(range(1, world) if rank == 0 else [0])
        self.between = max(0.1, min(MOST_BETWEEN, limit / 4))
        self.where = f"process {os.getpid()} on {socket.gethostname()}"
        self.closed = threading.Event()
        self.asked = 0
        self.reads, self.writes = os.pipe()
        os.set_blocking(self.writes, False)
        self.previous = signal.set_wakeup_fd(self.writes, warn_on_full_buffer=False)
        self.threads = [threading.Thread(target=run, daemon=True) for run in (self._talk, self._judge)]

    def start(self) -> RankWatch:
        for thread in self.threads:
            thread.start()
        return self

    def close(self) -> None:
        """Tell the others not to wait for more signs. Closing twice is allowed."""
        if self.closed.is_set():
            return
        self.closed.set()
        signal.set_wakeup_fd(self.previous)
        os.close(self.writes)  # which the judge sees
        self.threads[1].join()
        os.close(self.reads)
        # The talker may be in a call that nobody answers; the process may end all the same.
        self.threads[0].join(self.between)

    def _talk(self) -> None:
        beats, store = 0, self._connected()
        while True:
            beats += 1
            try:
                done = self.closed.is_set()
                store.set(str(self.rank), _DONE if done else f"{beats} {self.steps()} {self.where}")
                if done:
                    return
                # A question for a key that is not there yet would wait for it.
                known = [str(rank) for rank in self.signs.latest if self.signs.heard(rank) or store.check([str(rank)])]
                for rank, said in zip(known, store.multi_get(known) if known else [], strict=True):
                    self.signs.hear(int(rank), said.decode())
            except dist.DistStoreError:  # nobody answered in time
                if not store_in_a_rank():
                    self.signs.excuse()
                store = self._connected()  # the answer may still come, and would be taken for that of a later question
            except RuntimeError:
                self.signs.latest.clear()  # the store is gone, and with it the process that had it: it told why
                return
            # Soon again until all have begun, so that a rank that stops early is named with its step.
            self.closed.wait(self.between if all(map(self.signs.heard, list(self.signs.latest))) else 0.1)

    def _connected(self) -> dist.Store:
        # A connection of its own, since the main thread may use the other; torch's annotations lack the method.
        store = dist.PrefixStore("rank_watch", self.store.clone())  # type: ignore[attr-defined]
        store.set_timeout(timedelta(seconds=max(1.0, self.between)))
        return store

    def _judge(self) -> None:
        while not self.closed.is_set():
            ready, _, _ = select.select([self.reads], [], [], self.between)
            if ready:
                read = os.read(self.reads, 64)
                if not read:
                    return
                self.asked = self.asked or read[0]
            patience = min(self.limit, AFTER_SIGNAL) if self.asked else self.limit
            if silent := self.signs.silent(patience, self.between):
                self._end(silent)

    def _end(self, silent: list[str]) -> NoReturn:
        # Of several ranks that miss rank 0, the lowest tells it.
        time.sleep(TELLS_ALONE if self.rank > 1 else 0)
        asked = f"asked to stop by {signal.Signals(self.asked).name}, but " if self.asked else ""
        line = (
            f"{asked}{'; '.join(silent)}, of this rank {self.steps()} (train.rank_timeout is {self.limit:g}); nothing "
            "was saved, and the same command goes on from the newest checkpoint"
        )
        with contextlib.suppress(OSError, ValueError):  # a closed stream
            print(f"megatron-gemini: error: {line}", file=sys.stderr, flush=True)
            sys.stdout.flush()
        # The main thread waits in a collective, so that nothing raised here would reach it.
        os._exit(RANK_LOST)


def watch_ranks(rank: int, world: int, limit: float, steps: Callable[[], int]) -> RankWatch | None:
    """A running watch; None where there is nobody to watch, or `limit` is 0."""
    if world == 1 or not limit:
        return None
    return RankWatch(rank, world, limit, steps, job_store()).start()
