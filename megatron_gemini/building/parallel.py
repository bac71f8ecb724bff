"""A function over a stream in worker processes, results in order, where an item may kill or hang its process."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
AHEAD = 4  # items under way, a worker


class Workers(Generic[Item, Result]):
    """`workers` processes that each give an item `seconds` at most: SIGALRM ends the process of one that takes longer,
    also inside a decoder that never returns to Python.

    When a process ends, all items under way are tried again, each in a process of its own, so the result of every item
    but the guilty one is as if nothing had happened.
    """

    def __init__(self, function: Callable[[Item], Result], workers: int, seconds: float) -> None:
        self._function, self._workers, self._seconds = function, workers, seconds

    def map(self, items: Iterable[Item]) -> Iterator[tuple[Item, Result | None]]:
        """(item, result) in the order of the items; None for an item that took its process down."""
        pool, waiting = self._pool(self._workers), deque[tuple[Item, Future[Result] | None]]()
        try:
            for item in items:
                future: Future[Result] | None = None
                # An item before this one is to blame for a broken pool; it comes up when its turn comes.
                with contextlib.suppress(BrokenProcessPool):
                    future = pool.submit(_run, item)
                waiting.append((item, future))
                if len(waiting) < AHEAD * self._workers:
                    continue
                try:
                    yield self._first(waiting)
                except BrokenProcessPool:
                    pool.shutdown(cancel_futures=True)
                    yield from self._one_by_one(waiting)
                    pool = self._pool(self._workers)
            while waiting:
                try:
                    yield self._first(waiting)
                except BrokenProcessPool:
                    yield from self._one_by_one(waiting)
        finally:
            pool.shutdown(cancel_futures=True)

    def _pool(self, workers: int) -> ProcessPoolExecutor:
        fork = multiprocessing.get_context("fork")  # before there are threads; workers start with everything imported
        return ProcessPoolExecutor(workers, fork, _start, (self._function, self._seconds))

    @staticmethod
    def _first(waiting: deque[tuple[Item, Future[Result] | None]]) -> tuple[Item, Result]:
        item, future = waiting[0]
        if future is None:
            raise BrokenProcessPool
        # Taken off only then: an item whose process broke is to be tried again.
        result = future.result()
        waiting.popleft()
        return item, result

    def _one_by_one(self, waiting: deque[tuple[Item, Future[Result] | None]]) -> Iterator[tuple[Item, Result | None]]:
        # Nobody can tell which of the items under way has broken the pool, so each gets a process to break for itself.
        while waiting:
            item, _ = waiting.popleft()
            with self._pool(1) as pool:
                result: Result | None = None  # what it stays if the process ends
                with contextlib.suppress(BrokenProcessPool):
                    result = pool.submit(_run, item).result()
            yield item, result


_function: Callable | None = None
_limit = 0.0


def _start(function: Callable, seconds: float) -> None:
    """In a new worker: remember the task, leave Ctrl-C to the parent, and end when the parent is gone."""
    global _function, _limit
    _function, _limit = function, seconds
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A fork inherits the handlers of its parent. A handler in Python would run only when a decoder returns to Python.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    threading.Thread(target=_watch, args=(os.getppid(),), daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    # sys.exit would end this thread alone, and a worker that waits for its next item would stay.
    os._exit(1)


def _run(item: Any) -> Any:
    assert _function is not None
    signal.setitimer(signal.ITIMER_REAL, _limit)
    try:
        return _function(item)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
