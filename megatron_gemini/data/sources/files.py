"""What all formats have in common: the samples of a list of files, numbered through."""

from __future__ import annotations

import bisect
import itertools
from collections import Counter
from collections.abc import Sequence


class NumberedFiles:
    """Files of which each has some samples. A part of `spec.Records`.

    first_sample, rejected, damage: as there. window: no preference.
    """

    window = 0

    def __init__(self, paths: Sequence[str], counts: Sequence[int]) -> None:
        """counts: samples of every file."""
        self.paths = list(paths)
        self.first_sample = [0, *itertools.accumulate(counts)][:-1]
        self.rejected: Counter[str] = Counter()
        self.damage: dict[str, str] = {}
        self._samples = sum(counts)

    def __len__(self) -> int:
        return self._samples

    @property
    def bounds(self) -> Sequence[int]:
        """Samples of one file are cheap to read together."""
        return [*self.first_sample, len(self)]

    def path(self, sample: int) -> str:
        """The file that holds the sample."""
        return self.paths[self._find(sample)[0]]

    def _find(self, sample: int) -> tuple[int, int]:
        """(file, number of the sample in it). Raises IndexError."""
        if not 0 <= sample < self._samples:
            raise IndexError(f"sample {sample} of {self._samples}")
        file = bisect.bisect_right(self.first_sample, sample) - 1
        return file, sample - self.first_sample[file]
