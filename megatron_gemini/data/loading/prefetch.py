"""Make things ahead of time in one background thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Prefetch(Generic[T]):
    """Calls `make` up to `depth` times ahead, in order, from the first `next()` on; depth 0 uses no thread.

    What `make` raises is raised by `next()` in its turn, and again by every later one.
    """

    def __init__(self, make: Callable[[], T], depth: int) -> None:
        self._make, self._depth = make, depth
        # Bounded, since whatever is ready is held in memory: rows with their pixels.
        self._ready: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(maxsize=max(depth, 1))
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def next(self) -> T:
        """The next thing, waiting for it if need be."""
        if self._error is not None:
            raise self._error
        if self._stop.is_set():
            raise RuntimeError("next() after close()")
        if not self._depth:
            return self._make()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="data-prefetch", daemon=True)
            self._thread.start()
        thing, self._error = self._ready.get()
        if self._error is not None:
            raise self._error
        assert thing is not None
        return thing

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self._ready.put((self._make(), None))
            except BaseException as error:  # whatever it is, it belongs to the caller of next()
                self._ready.put((None, error))
                return

    def close(self) -> None:
        """Stop after the thing being made, and drop what is ready. Safe to call twice."""
        # The thread may be in the middle of a row, or wait at the full queue for a reader that does not come any more.
        self._stop.set()
        while self._thread is not None and self._thread.is_alive():
            while not self._ready.empty():  # a full queue would hold the thread
                self._ready.get_nowait()
            self._thread.join(timeout=0.01)
