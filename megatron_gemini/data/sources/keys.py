"""Keys of many samples as a sequence that makes each one when it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import overload


class Keys(Sequence[str]):
    """The keys of `count` samples; key: that of sample 0 to count - 1."""

    def __init__(self, count: int, key: Callable[[int], str]) -> None:
        self._count, self._key = count, key

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, sample: int) -> str: ...
    @overload
    def __getitem__(self, sample: slice) -> list[str]: ...
    def __getitem__(self, sample: int | slice) -> str | list[str]:
        if isinstance(sample, slice):
            return [self._key(number) for number in range(*sample.indices(self._count))]
        return self._key(sample + self._count if sample < 0 else sample)
