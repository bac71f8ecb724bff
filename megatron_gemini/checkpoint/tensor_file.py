"""safetensors files, one tensor after the other: written while they are hashed, read by ranges of elements.

The format: 8 bytes with the length of a JSON header, the header, the tensors without gaps
(https://github.com/huggingface/safetensors). The library writes all tensors of a file from memory at once.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_gemini.checkpoint.blocks import BlockCache, BlockFile, BlockHash, Entry

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
MOST_HEADER = 1 << 28  # of the header, which may be a stranger's
_PART = 1 << 25  # bytes written at once: a page cache that fills up at the end would stall


@dataclass(frozen=True)
class Outgoing:
    """A tensor that is to be written. read: gives it, on any device, when its turn has come."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]


def write_tensors(path: Path, tensors: Sequence[Outgoing]) -> Entry:
    """Write and flush to the disk; holds one tensor at a time. Returns what an index says of the file."""
    header, end = dict[str, dict[str, object]](), 0
    for each in tensors:
        begin, end = end, end + math.prod(each.shape) * each.dtype.itemsize
        header[each.key] = {"dtype": _NAMES[each.dtype], "shape": [*each.shape], "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that tensors are aligned
    hashed = BlockHash()
    # A thread writes while this one hashes: neither holds the interpreter's lock.
    with path.open("wb") as file, ThreadPoolExecutor(1) as pool:
        for head in (len(text).to_bytes(8, "little"), text):
            file.write(head)
            hashed.update(head)
        for each in tensors:
            values = each.read().detach().to("cpu", each.dtype).contiguous()
            assert values.shape == each.shape, (each.key, values.shape, each.shape)
            content = values.view(-1).view(torch.uint8).numpy().data if values.numel() else memoryview(b"")
            for start in range(0, len(content), _PART):
                part = content[start : start + _PART]
                written = pool.submit(file.write, part)
                hashed.update(part)
                written.result()
        file.flush()
        os.fsync(file.fileno())
    return hashed.entry()


@dataclass(frozen=True)
class _Place:
    dtype: torch.dtype
    count: int
    start: int


class TensorFile:
    """Tensors of a file, by ranges of their elements. entry: of the index, with which what is read is compared.

    Raises OSError, or ValueError for a header that is damaged.
    """

    def __init__(self, path: Path, entry: Entry | None, cache: BlockCache) -> None:
        self._file = BlockFile(path, entry, cache)
        self._places = dict(self._header())

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def count(self, key: str) -> int:
        """Elements of a tensor."""
        return self._places[key].count

    def read(self, key: str, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of a flattened tensor, in the dtype that it has in the file."""
        place = self._places[key]
        size, first = place.dtype.itemsize, place.start
        if start == stop:
            return torch.empty(0, dtype=place.dtype)
        return torch.frombuffer(self._file.read(first + start * size, first + stop * size), dtype=place.dtype)

    def read_into(self, key: str, start: int, target: torch.Tensor) -> bool:
        """Fill target, contiguous and on the CPU, with elements from `start` on. False, and nothing done, if its dtype
        is another one than the file's."""
        place = self._places[key]
        if target.dtype != place.dtype:
            return False
        if len(target):
            view = target.view(torch.uint8).numpy().data
            self._file.read_into(view, place.start + start * place.dtype.itemsize)
        return True

    def _header(self) -> list[tuple[str, _Place]]:
        length = int.from_bytes(self._file.read(0, min(8, self._file.size)), "little")
        if self._file.size < 8 or length > min(MOST_HEADER, self._file.size - 8):
            raise ValueError("its header is longer than the file")
        try:
            header = json.loads(bytes(self._file.read(8, 8 + length)))
            return [self._place(key, value, 8 + length) for key, value in header.items() if key != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"its header is damaged: {error}") from error

    def _place(self, key: str, value: dict[str, object], data: int) -> tuple[str, _Place]:
        shape, offsets, dtype = value["shape"], value["data_offsets"], DTYPES[str(value["dtype"])]
        if not (isinstance(shape, list) and isinstance(offsets, list)):
            raise TypeError(f"{key} has no shape or no place")
        begin, end = offsets
        if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
            raise ValueError(f"{key} has something else in the place of a number")
        if end - begin != math.prod(shape) * dtype.itemsize or data + end > self._file.size:
            raise ValueError(f"{key} does not lie in the file")
        return key, _Place(dtype, math.prod(shape), data + begin)
