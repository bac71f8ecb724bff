"""A socket with one deadline for all that it does.

A socket's own timeout starts anew with every byte, so a server that sends one now and then would hold its reader for
ever. This is the part of a socket's interface that http.client uses.
"""

from __future__ import annotations

import io
import socket
import time
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer


class TimedSocket:
    """`connected` until `deadline` (of time.monotonic); after it everything raises TimeoutError."""

    def __init__(self, connected: socket.socket, deadline: float) -> None:
        self._socket, self._deadline = connected, deadline

    def wait(self) -> socket.socket:
        """The socket, allowed to wait for the time that is left."""
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("the time is over")
        # Before every call anew, and always what is left of the whole.
        self._socket.settimeout(left)
        return self._socket

    def sendall(self, data: ReadableBuffer) -> None:
        self.wait().sendall(data)

    def makefile(self, mode: str) -> io.BufferedReader:
        assert mode == "rb", mode
        return io.BufferedReader(_Reader(self))

    def close(self) -> None:
        """Nothing yet: http.client closes its socket before the answer has been read. `with` does it."""

    def __enter__(self) -> TimedSocket:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()


class _Reader(io.RawIOBase):
    def __init__(self, source: TimedSocket) -> None:
        self._source = source

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        return self._source.wait().recv_into(buffer)
