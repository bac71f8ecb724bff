"""The worker processes of a rank: rows in order from many processes, of which any may crash or hang."""

from __future__ import annotations

import atexit
import ctypes
import logging
import math
import multiprocessing
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from typing import NamedTuple, cast

import torch

from megatron_gemini import plugins
from megatron_gemini.config.run import RunConfig
from megatron_gemini.contracts import Batch, RowFormat, TokenLayout
from megatron_gemini.data.loading.lane import LaneState, Quarantined, with_quarantined
from megatron_gemini.data.loading.source import source_labels
from megatron_gemini.data.loading.worker import LANE, POSITION, READING, SOURCE, STARTED, WorkerTask, run_worker
from megatron_gemini.data.packing.wire import from_bytes, parse_header
from megatron_gemini.data.samples.document import Encodes
from megatron_gemini.modalities.bad_sample import DataUnreachable

logger = logging.getLogger(__name__)
_LOOK = 0.1  # seconds between two looks at a worker that is waited for
_STORAGE_SECONDS = 600.0  # that one read may take; a network file system may wait for its server for ever
_DEATHS = 3  # of a worker outside any sample, one after the other, before the run stops


class PoolClosed(Exception):
    """The pool was closed while a row was being waited for."""


class _Running(NamedTuple):
    """A worker's process, with the ends of its pipes that this one holds. now_decoding: see `worker.run_worker`."""

    process: ForkServerProcess
    rows: Connection
    lifeline: Connection
    now_decoding: ctypes.Array[ctypes.c_double]

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.rows.close()
        self.lifeline.close()


@dataclass(eq=False)
class _Worker:
    """One worker's place, in which processes follow each other. deaths: in a row, with no sample to blame. killed_at:
    (lane, source, position) of the sample at which the last one was killed from outside."""

    work: WorkerTask
    running: _Running | None = None
    deaths: int = 0
    killed_at: tuple[int, int, int] | None = None

    def now(self) -> _Running:
        if self.running is None:
            raise PoolClosed
        return self.running


@dataclass
class Lanes:
    """The lanes of a rank: their states after the rows received so far, and the samples given up in each."""

    states: dict[str, LaneState]
    quarantined: dict[int, list[Quarantined]] = field(default_factory=dict)


class WorkerPool:
    """Runs the lanes of a rank in data.workers processes, each lane in one of them.

    The processes are forked from a server that has imported what they need and nothing else. So none inherits the
    rank's threads, GPU or network connections, and a new one starts in milliseconds. A process that dies or needs more
    than data.sample_seconds for a sample is replaced, and what it was decoding is given up. The lane counts and skips
    it, in this process and, through the lane's state, in every later one. A process that is killed from outside, as for
    lack of memory, blames its sample only when that happens twice at the same one.
    """

    def __init__(
        self,
        config: RunConfig,
        layout: TokenLayout,
        tokenizer: Encodes,
        form: RowFormat,
        lanes: Lanes,
        first: int,
        pin: bool,
    ) -> None:
        """lanes: with the states of all lanes of the rank, of which there must be some. first: row of the run to begin
        with. pin: page-locked rows."""
        self._config, self._lanes, self._pin, self._closing = config, lanes, pin, threading.Event()
        self._labels = source_labels(config.data.sources)
        self._context = multiprocessing.get_context("forkserver")
        # Imported once, in the server, so that a worker in the place of another is there in milliseconds.
        self._context.set_forkserver_preload(["megatron_gemini.data.loading.worker"])
        numbers = sorted(map(int, lanes.states))
        count = min(config.data.workers, len(numbers))
        # In the order in which rows need them, so that consecutive rows come from different workers.
        shares: list[Sequence[int]] = [numbers[place::count] for place in range(count)]
        cache, each_step = config.data.cache_bytes // count, config.train.rows_per_step / config.data.lanes
        ahead = [max(1, config.data.prefetch) * math.ceil(len(share) * each_step) for share in shares]
        self._workers = [
            _Worker(WorkerTask(config, layout, tokenizer, form, share, cache, rows, None, first, plugins.loaded()))
            for share, rows in zip(shares, ahead, strict=True)
        ]
        self._of_lane = {lane: worker for worker in self._workers for lane in worker.work.lanes}
        atexit.register(self.close)  # a run that ends with an error closes nothing
        for worker in self._workers:
            self._start(worker)

    def row(self, number: int) -> tuple[Batch, LaneState]:
        """Row `number` and the state of its lane after it. Each worker's rows must be asked for in their order.

        Raises ValueError for what ends the reading (see `LaneReader`), DataUnreachable, `PoolClosed` after `close`.
        """
        lane = number % self._config.data.lanes
        worker = self._of_lane[lane]
        while True:
            try:
                made, state, batch = self._receive(worker.now())
                break
            except (EOFError, OSError) as error:
                self._replace(worker, slow=isinstance(error, TimeoutError))
        assert made == number, (made, number)
        worker.deaths = 0
        self._lanes.states[str(lane)] = state
        # What the worker has made ahead is lost with it: another one goes on from the last row that has arrived.
        worker.work = replace(worker.work, first=number + 1)
        return batch, state

    def _receive(self, running: _Running) -> tuple[int, LaneState, Batch]:
        """(number of a row, state of its lane after it, the row).

        Raises TimeoutError for a sample that takes too long, EOFError or OSError for a dead worker, and what ended the
        reading: ValueError or DataUnreachable.
        """
        while not running.rows.poll(_LOOK):
            if self._closing.is_set():
                raise PoolClosed
            if self._late(running):
                raise TimeoutError
        header = parse_header(running.rows.recv_bytes())
        if header.get("error"):
            kind = DataUnreachable if header.get("unreachable") else ValueError
            raise kind(running.rows.recv_bytes().decode(errors="replace"))
        body = torch.empty(header["bytes"], dtype=torch.uint8, pin_memory=self._pin)
        # Into page-locked memory at once: the row is copied to the GPU from where it has arrived.
        running.rows.recv_bytes_into(memoryview(body.numpy()))  # type: ignore[arg-type]
        number, state = header["extra"]["row"], header["extra"]["state"]
        return cast("int", number), cast("LaneState", state), from_bytes(header, body)

    def _late(self, running: _Running) -> bool:
        """Whether its sample takes too long. Raises DataUnreachable for storage that does not answer at all."""
        started = running.now_decoding[STARTED]
        seconds = time.monotonic() - started if started > 0 else 0.0
        if not running.now_decoding[READING]:
            return seconds > self._config.data.sample_seconds
        if seconds > _STORAGE_SECONDS:
            raise DataUnreachable(
                f"a data worker has waited for the storage for {seconds:.0f} seconds, without an error"
            )
        return False

    def _replace(self, worker: _Worker, slow: bool) -> None:
        """End what is left of a worker, give up what it was decoding, and start another one in its place."""
        if self._closing.is_set():
            raise PoolClosed
        ended = worker.now()
        ended.end()  # from here on, what it says of itself stays as it is
        lane, source, position = (int(ended.now_decoding[place]) for place in (LANE, SOURCE, POSITION))
        blamed = ended.now_decoding[STARTED] > 0 and (not slow or self._late(ended))
        # No decoder ends with SIGKILL: that is the kernel's, when memory runs out, and any sample may be at work then.
        # Killed twice at the same one, it is likely to be what needs the memory.
        if blamed and not slow and ended.process.exitcode == -signal.SIGKILL:
            again = worker.killed_at == (lane, source, position)
            worker.killed_at = None if again else (lane, source, position)
            blamed = again
        if blamed:
            label, reason = self._labels[source], "too_slow" if slow else "worker_crashed"
            self._lanes.quarantined.setdefault(lane, []).append((label, position, reason))
            logger.warning("quarantined the sample at position %d of %s (%s); it is counted", position, label, reason)
        elif not slow:  # a slow one had just finished its sample
            worker.deaths += 1
            if worker.deaths >= _DEATHS:
                raise ValueError(
                    f"a data worker was ended {worker.deaths} times (status {ended.process.exitcode}), and no sample "
                    "can be named for it; does the machine have enough memory for data.workers processes?"
                )
        self._start(worker)

    def _start(self, worker: _Worker) -> None:
        states = {}
        for lane in worker.work.lanes:
            quarantined = self._lanes.quarantined.get(lane, [])
            states[str(lane)] = with_quarantined(
                self._lanes.states[str(lane)], lane, self._config.data.lanes, quarantined
            )
        worker.work = replace(worker.work, states=states)
        receiving, sending = self._context.Pipe(duplex=False)
        watching, lifeline = self._context.Pipe(duplex=False)
        # Memory that both see, without a lock: one that a killed process holds would stay locked for ever.
        now_decoding = self._context.RawArray(ctypes.c_double, 5)
        process = self._context.Process(
            target=run_worker,
            args=(worker.work.packed(), sending, watching, now_decoding),
            name="data-worker",
            daemon=True,
        )
        process.start()
        # The ends that the process has must be closed here, or its death would not end what is read from it.
        sending.close()
        watching.close()
        worker.running = _Running(process, receiving, lifeline, now_decoding)

    def interrupt(self) -> None:
        """Let `row`, in whichever thread it waits, raise `PoolClosed`."""
        self._closing.set()

    def close(self) -> None:
        """End the processes. Safe to call twice."""
        self.interrupt()
        for worker in self._workers:
            if worker.running is not None:
                worker.running.end()
                worker.running = None
        atexit.unregister(self.close)
