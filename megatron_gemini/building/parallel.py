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
from dataclasses import dataclass
from typing import Generic, TypeVar, cast

Item = TypeVar("Item")
Result = TypeVar("Result")
AHEAD = 4  # items under way, a worker: enough that none waits for the one whose result is due


class Workers(Generic[Item, Result]):
    """`workers` processes that each give an item `seconds` at most: SIGALRM ends the process of one that takes longer,
    also inside a decoder that never returns to Python.

    When a process ends, all items under way are tried again, each in a process of its own, so the result of every item
    but the guilty one is as if nothing had happened.
    """

    def __init__(self, function: Callable[[Item], Result], workers: int, seconds: float) -> None:
        self._task, self._workers = _Task(function, seconds), workers

    def map(self, items: Iterable[Item]) -> Iterator[tuple[Item, Result | None]]:
        """(item, result) in the order of the items; None for an item that took its process down."""
        pool, waiting = self._pool(self._workers), deque[tuple[Item, Future[Result] | None]]()
        try:
            for item in items:
                waiting.append((item, self._submit(pool, item)))
                if len(waiting) < AHEAD * self._workers:
                    continue
                try:
                    yield self._first(waiting)
                except BrokenProcessPool:
                    # The pool does not tell which item it was, and gives up all that were under way.
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
        return ProcessPoolExecutor(workers, fork, _start, (self._task,))

    @staticmethod
    def _submit(pool: ProcessPoolExecutor, item: Item) -> Future[Result] | None:
        try:
            return cast("Future[Result]", pool.submit(_run, item))
        except BrokenProcessPool:  # an item before this one is to blame; it comes up when its turn comes
            return None

    @staticmethod
    def _first(waiting: deque[tuple[Item, Future[Result] | None]]) -> tuple[Item, Result]:
        item, future = waiting[0]
        if future is None:
            raise BrokenProcessPool
        result = future.result()
        waiting.popleft()
        return item, result

    def _one_by_one(self, waiting: deque[tuple[Item, Future[Result] | None]]) -> Iterator[tuple[Item, Result | None]]:
        while waiting:
            item, _ = waiting.popleft()
            with self._pool(1) as pool:
                result: Result | None = None  # what it stays if the process ends
                with contextlib.suppress(BrokenProcessPool):
                    result = cast("Result", pool.submit(_run, item).result())
            yield item, result


@dataclass(frozen=True)
class _Task(Generic[Item, Result]):
    """What the workers do, with an end to the process at an item that takes too long."""

    function: Callable[[Item], Result]
    seconds: float

    def __call__(self, item: Item) -> Result:
        signal.setitimer(signal.ITIMER_REAL, self.seconds)
        try:
            return self.function(item)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)


_task: _Task | None = None
"""Of this process, if it is a worker. It comes by the fork, so that it need not be fit for pickling."""


def _start(task: _Task[Item, Result]) -> None:
    """In a new worker: remember the task, leave Ctrl-C to the parent, and end when the parent is gone."""
    global _task
    _task = task
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    threading.Thread(target=_watch, args=(os.getppid(),), daemon=True).start()


def _watch(parent: int) -> None:
    # A build that is killed cannot end its workers, which would go on downloading.
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _run(item: Item) -> object:
    assert _task is not None
    return _task(item)
