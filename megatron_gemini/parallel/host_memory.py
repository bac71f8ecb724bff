"""Activations that wait for their backward in host memory."""

from __future__ import annotations

import functools

import torch


class OnHost:
    """One of a chain of tensors that are made one after another and wanted back in the reverse order.

    Its copy to the host begins at once, and its device memory is free when the next one is made: the newest, which is
    wanted first, is always there. Each of the others comes back while the work that needed the one after it is under
    way. On CUDA the copies are between pinned memory and a stream of their own. Device memory is handed out and taken
    back by the current stream only, which waits for the copies. Otherwise torch's allocator would keep it for as long
    as the CPU is ahead of the GPU, which may be all the layers. On a CPU the same happens by plain copies.
    """

    def __init__(self, x: torch.Tensor, before: OnHost | None) -> None:
        """before: the one of the chain that was made before this one."""
        self._x: torch.Tensor | None = x.detach()
        self._device, self._before, self._stream = x.device, before, _copy_stream(x.device)
        # Pinned: from pageable memory CUDA copies by way of a buffer of its own, and the CPU waits for it.
        host = torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda)
        self._host: torch.Tensor | None = host
        self._copied = self._copy(host, x)
        if before is not None:
            before._wait()
            before._x = None  # not this one's: its backward comes first, and would fetch it at once

    def take(self) -> torch.Tensor:
        """The tensor on its device, once; the one before it begins to come back."""
        self._fetch()
        if self._before is not None:
            self._before._fetch()  # behind this one's copy on their stream, and in time for the next backward
        self._wait()
        x, self._x, self._host, self._before = self._x, None, None, None
        assert x is not None, "taken twice"
        return x

    def _fetch(self) -> None:
        if self._x is None and self._host is not None:
            self._x = torch.empty(self._host.shape, dtype=self._host.dtype, device=self._device)
            self._copied = self._copy(self._x, self._host)

    def _copy(self, to: torch.Tensor, of: torch.Tensor) -> torch.cuda.Event | None:
        """Begin to copy, after all that the current stream has been given; returns the event of its end."""
        if self._stream is None:
            to.copy_(of)
            return None
        # The current stream may still be making what is copied, and reading the memory that it is copied to.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            to.copy_(of, non_blocking=True)
        return self._stream.record_event()

    def _wait(self) -> None:
        if self._copied is not None:
            torch.cuda.current_stream(self._device).wait_event(self._copied)


@functools.cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream | None:
    return torch.cuda.Stream(device) if device.type == "cuda" else None
