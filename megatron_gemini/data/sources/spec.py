"""What a file format is: which files are of it, and how their samples are read.

A format is an entry of `registry.FORMATS`, in a file of its own or of a plugin's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


class Records(Protocol):
    """Samples of a list of files, numbered through.

    first_sample: number of the first sample of every file. bounds: where blocks of samples that are cheap to read
    together begin, and the number of all; window: samples worth shuffling together, 0 for no preference.
    rejected: what was left out, by reason. damage: files that break off, by path.
    """

    paths: list[str]
    first_sample: list[int]
    rejected: Counter[str]
    damage: dict[str, str]

    def __len__(self) -> int: ...

    @property
    def bounds(self) -> Sequence[int]: ...

    @property
    def window(self) -> int: ...

    def key(self, sample: int) -> str:
        """A name of the sample that is its own among all of the source."""

    def endings(self, sample: int) -> list[str]:
        """Names of the sample's members; of a table, of the whole record alone."""

    def path(self, sample: int) -> str:
        """The file that holds the sample."""

    def read(self, sample: int, names: Sequence[str]) -> dict[str, bytes]:
        """Those of the named members or columns that the sample has; columns as `columns.column_bytes` gives them.

        Raises BadSample for content that is bad, DataUnreachable for storage that is away (see `storage.patiently`).
        """


@dataclass(frozen=True)
class FormatSpec:
    """A file format.

    endings: of files that are of it where a source does not say, in lower case and with their dot.
    open: (paths, names of what will be read of samples, folder for indices that take long to make or None) -> the
        samples. Raises ValueError that names the file for one that cannot be read.
    """

    name: str
    endings: tuple[str, ...]
    open: Callable[[Sequence[str], Sequence[str], Path | None], Records]
