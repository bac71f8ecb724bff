"""One worker process: it runs some lanes of a rank and sends their rows until it is ended."""

from __future__ import annotations

import ctypes
import fcntl
import itertools
import os
import pickle
import signal
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import cast

import torch

from megatron_gemini import plugins
from megatron_gemini.config.run import RunConfig
from megatron_gemini.config.schema import Plain
from megatron_gemini.contracts import Batch, RowFormat, TokenLayout
from megatron_gemini.data.loading.lane import LaneState
from megatron_gemini.data.loading.prefetch import Prefetch
from megatron_gemini.data.loading.reader import LaneReader, make_sources
from megatron_gemini.data.packing.wire import to_bytes
from megatron_gemini.data.samples.document import Encodes
from megatron_gemini.data.sources import storage
from megatron_gemini.modalities.bad_sample import DataUnreachable

# Of what a worker says that it is decoding. STARTED: by the clock, 0 for nothing. READING: 1 while it reads storage.
LANE, SOURCE, POSITION, STARTED, READING = range(5)


@dataclass(frozen=True)
class WorkerTask:
    """What a worker is to do: its lanes, and the row of the run from which on it makes theirs."""

    config: RunConfig
    layout: TokenLayout
    tokenizer: Encodes
    form: RowFormat
    lanes: Sequence[int]
    cache_bytes: int
    ahead: int
    """Rows to make before they are asked for."""
    states: Mapping[str, LaneState] | None
    """Of its lanes; None at the beginning of a run."""
    first: int
    plugins: tuple[str, ...] = ()
    """Modules that the rank has loaded, for the worker to load as well."""

    def packed(self) -> Packed:
        return Packed(self.plugins, pickle.dumps(self))


@dataclass(frozen=True)
class Packed:
    """Work on its way to a process, which loads the plugins before it unpacks the rest.

    Unpickling imports the modules of whatever the configuration holds, in no particular order. A plugin's modality
    would then get another control token than in the rank, where plugins are loaded in the order of their names.
    """

    plugins: tuple[str, ...]
    content: bytes

    def unpack(self) -> WorkerTask:
        """Raises ValueError for a plugin that cannot be loaded."""
        plugins.load(self.plugins)
        return cast("WorkerTask", pickle.loads(self.content))


def run_worker(
    packed: Packed, rows: Connection, lifeline: Connection, now_decoding: ctypes.Array[ctypes.c_double]
) -> None:
    """The whole life of a worker process. now_decoding: five numbers, see `LANE` and the following."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # they are the rank's business; its end is the end of this process too
    _end_with_parent(lifeline)
    try:
        work = packed.unpack()
        torch.set_num_threads(1)  # the workers are the parallelism
        _send_rows(work, rows, now_decoding)
    except (BrokenPipeError, ConnectionResetError):
        pass
    except DataUnreachable as error:
        _send_error(rows, str(error), b'{"error": true, "unreachable": true}')
    except ValueError as error:
        _send_error(rows, str(error))
    except BaseException:
        _send_error(rows, f"a data worker failed:\n{traceback.format_exc()}")


def _send_rows(work: WorkerTask, rows: Connection, now_decoding: ctypes.Array[ctypes.c_double]) -> None:
    def watch(lane: int, source: int, position: int) -> None:
        now_decoding[LANE], now_decoding[SOURCE], now_decoding[POSITION] = lane, source, position
        now_decoding[STARTED] = time.monotonic()

    def done() -> None:
        now_decoding[STARTED] = 0.0

    def reading(reads: bool) -> None:
        # Storage that is slow is no fault of the sample, which has all its time for what is done with it.
        now_decoding[READING] = float(reads)
        if now_decoding[STARTED] > 0:
            now_decoding[STARTED] = time.monotonic()

    storage.reading = reading
    sources = make_sources(work.config, work.layout, work.tokenizer, work.cache_bytes)
    reader = LaneReader(work.config, sources, work.lanes, work.form, watch, done)
    if work.states is not None:
        reader.load_states(work.states)
    mine = set(work.lanes)
    numbers = (number for number in itertools.count(work.first) if number % work.config.data.lanes in mine)

    def make() -> tuple[int, Batch, LaneState]:
        number = next(numbers)
        return (number, *reader.row(number))

    # A pipe holds 64 kB, less than a row with its pixels: without this thread a worker would rest until it is asked.
    ahead = Prefetch(make, work.ahead)
    while True:
        number, batch, state = ahead.next()
        header, body = to_bytes(batch, {"row": number, "state": cast("Plain", state)})
        # Two messages: the first has the size of the second, which the rank then receives where it is to stay.
        rows.send_bytes(header)
        rows.send_bytes(body)


def _send_error(rows: Connection, text: str, header: bytes = b'{"error": true}') -> None:
    body = text.encode(errors="backslashreplace")
    try:
        rows.send_bytes(header)
        rows.send_bytes(body or b" ")
    except OSError:
        pass


def _end_with_parent(lifeline: Connection) -> None:
    """Die when the other end of a pipe that carries nothing is closed, even by SIGKILL of its process.

    The kernel then sends SIGIO, whose default is death. A thread that waits for it would not run while a decoder holds
    the interpreter's lock for ever.
    """
    descriptor = lifeline.fileno()
    fcntl.fcntl(descriptor, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) | os.O_ASYNC)
    if lifeline.poll(0):  # closed before
        os._exit(1)
