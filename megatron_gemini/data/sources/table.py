"""What the files of tables have in common: records by number over all files."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from pathlib import PurePosixPath

from megatron_gemini.data.sources.columns import RECORD


class Table:
    """Records of a list of files, numbered through. A record's key is `file/number in the file`."""

    window = 0

    def __init__(self, paths: Sequence[str], counts: Sequence[int]) -> None:
        for path, count in zip(paths, counts, strict=True):
            if not count:
                raise ValueError(f"{path!r} holds no record; leave it out of the data source")
        self.paths = list(paths)
        self.first_sample = [0, *itertools.accumulate(counts)][:-1]
        self.rejected: dict[str, int] = {}
        self.damage: dict[str, str] = {}
        self._samples = sum(counts)

    def __len__(self) -> int:
        return self._samples

    @property
    def bounds(self) -> Sequence[int]:
        return [*self.first_sample, len(self)]

    def endings(self, sample: int) -> list[str]:
        """The name of the whole record: which columns it has is known only once it is read."""
        return [RECORD]

    def path(self, sample: int) -> str:
        """The file that holds the sample."""
        return self.paths[self._find(sample)[0]]

    def key(self, sample: int) -> str:
        file, number = self._find(sample)
        return f"{PurePosixPath(self.paths[file]).stem}/{number}"

    def _find(self, sample: int) -> tuple[int, int]:
        """(file, number of the record in it). Raises IndexError."""
        if not 0 <= sample < self._samples:
            raise IndexError(f"record {sample} of {self._samples}")
        file = bisect.bisect_right(self.first_sample, sample) - 1
        return file, sample - self.first_sample[file]
