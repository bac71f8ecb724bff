"""Files in blocks, each with a hash: a range of a large file can be read and trusted without the rest of it.

The hash is XXH3 of 128 bits, which is as fast as the memory. It finds damage. Against intent no hash helps that lies
beside the file: whoever changes one can change the other.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from xxhash import xxh3_128

Content: TypeAlias = bytes | bytearray | memoryview

BLOCK = 1 << 23
DIGITS = 32
"""Hexadecimal digits of a block's hash."""
KEPT = 8
"""Blocks that a reader keeps, since neighboring pieces share them."""


class DamagedError(ValueError):
    """Something of a checkpoint is not what was saved."""


@dataclass(frozen=True)
class Entry:
    """What an index says of a file. size: bytes. hashes: of its blocks one after the other, in hexadecimal."""

    size: int
    hashes: str

    def of_block(self, number: int) -> str:
        return self.hashes[number * DIGITS : (number + 1) * DIGITS]


def block_count(size: int) -> int:
    return -(-size // BLOCK)


class BlockHash:
    """The entry of a file, from its content while it is written."""

    def __init__(self) -> None:
        self._size, self._hashes, self._open = 0, list[str](), xxh3_128()

    def update(self, content: Content) -> None:
        rest = memoryview(content).cast("B")
        while len(rest):
            part = rest[: BLOCK - self._size % BLOCK]
            self._open.update(part)
            self._size += len(part)
            rest = rest[len(part) :]
            if self._size % BLOCK == 0:
                self._hashes.append(self._open.hexdigest())
                self._open.reset()

    def entry(self) -> Entry:
        last = [self._open.hexdigest()] if self._size % BLOCK else []
        return Entry(self._size, "".join([*self._hashes, *last]))


def hash_file(path: Path) -> Entry:
    """The entry of what is on the disk."""
    found = BlockHash()
    with path.open("rb") as file:
        while part := file.read(BLOCK):
            found.update(part)
    return found.entry()


def _unfilled(size: int) -> memoryview:
    import numpy as np  # here, since what lists checkpoints and `--help` do without

    # A bytearray would be filled with zeros first: loading 0.5 GB from a tmpfs took 0.21 s so, with one more copy.
    return np.empty(size, np.uint8).data


class BlockCache:
    """The blocks that were read last, of any file. pool: a thread that compares."""

    def __init__(self) -> None:
        self._blocks: OrderedDict[tuple[Path, int], memoryview] = OrderedDict()
        self.pool = ThreadPoolExecutor(1)

    def get(self, key: tuple[Path, int]) -> memoryview | None:
        if key in self._blocks:
            self._blocks.move_to_end(key)
        return self._blocks.get(key)

    def put(self, key: tuple[Path, int], block: memoryview) -> None:
        self._blocks[key] = block
        if len(self._blocks) > KEPT:
            self._blocks.popitem(last=False)


class BlockFile:
    """Ranges of a file. entry: what its blocks are compared with; None reads them as they are.

    Raises OSError, or DamagedError for a block that differs.
    """

    def __init__(self, path: Path, entry: Entry | None, cache: BlockCache) -> None:
        self.path, self._entry, self._cache = path, entry, cache
        self._file = os.open(path, os.O_RDONLY)
        self.size = os.fstat(self._file).st_size
        if entry is not None and entry.size != self.size:
            raise self._damaged()

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            os.close(self._file)

    def read(self, start: int, stop: int) -> memoryview:
        """Bytes [start, stop), of blocks that were all compared."""
        found = _unfilled(max(stop - start, 0))
        self.read_into(found, start)
        return found

    def read_into(self, view: memoryview, start: int) -> None:
        """Fill a view of bytes with those from `start` on, of blocks that were all compared."""
        stop = start + len(view)
        if not 0 <= start <= stop <= self.size:
            raise ValueError(f"{self.path} has {self.size} bytes, {start} to {stop} are asked for")
        if self._entry is None:
            self._fill(view, start)
            return
        comparing = list[Future[None]]()
        for number in range(start // BLOCK, block_count(stop)):
            begin, end = number * BLOCK, min((number + 1) * BLOCK, self.size)
            if start <= begin and end <= stop:  # straight to its place
                self._fill(view[begin - start : end - start], begin)
                # While the next one is read: neither holds the interpreter's lock.
                comparing.append(self._cache.pool.submit(self._check, number, view[begin - start : end - start]))
                continue
            block = self._block(number, begin, end)
            first, last = max(start, begin), min(stop, end)
            view[first - start : last - start] = block[first - begin : last - begin]
        for each in comparing:
            each.result()

    def _block(self, number: int, begin: int, end: int) -> memoryview:
        block = self._cache.get((self.path, number))
        if block is None:
            block = _unfilled(end - begin)
            self._fill(block, begin)
            self._check(number, block)
            self._cache.put((self.path, number), block)
        return block

    def _fill(self, view: memoryview, start: int) -> None:
        done = 0
        while done < len(view):  # a call may give less than was asked for
            count = os.preadv(self._file, [view[done:]], start + done)
            if not count:
                raise self._damaged()
            done += count

    def _check(self, number: int, block: Content) -> None:
        assert self._entry is not None
        if xxh3_128(block).hexdigest() != self._entry.of_block(number):
            raise self._damaged()

    def _damaged(self) -> DamagedError:
        return DamagedError(f"{self.path} is not what was saved (its hash differs); the checkpoint is damaged")
