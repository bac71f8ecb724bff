"""Parquet: records by row group, of which the last used ones are kept."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, BinaryIO, TypeVar

from megatron_gemini.data.sources.columns import RECORD, column_bytes, named_cell, named_column, record_bytes
from megatron_gemini.data.sources.paths import open_binary
from megatron_gemini.data.sources.recognize import PARQUET as PARQUET_FILE
from megatron_gemini.data.sources.recognize import recognize
from megatron_gemini.data.sources.spec import FormatSpec
from megatron_gemini.data.sources.storage import MISTAKES, patiently
from megatron_gemini.data.sources.table import Table
from megatron_gemini.modalities.bad_sample import BadSample, one_line

if TYPE_CHECKING:
    import pyarrow
    from pyarrow.parquet import RowGroupMetaData as RowGroup

Read = TypeVar("Read")
GROUPS_TOGETHER = 4  # row groups whose records are shuffled together
_KEPT = 2 * GROUPS_TOGETHER + 1  # some lanes begin a window while others finish the one before
MAX_GROUP_BYTES = 1024 * 1024 * 1024  # of the columns that are read
KEPT_BYTES = (
    1024 * 1024 * 1024
)  # of a source in a process; of larger groups two are kept, or windows would be read anew


class Parquet(Table):
    """Parquet files, of which only the columns in `names` are read, or all of them if the whole record is.

    The footers are read at the start, a row group when a record of it is asked for. Raises ValueError naming the file
    when one cannot be read, has a row group above 1 GiB, or has none of the columns.
    """

    def __init__(self, paths: Sequence[str], names: Sequence[str]) -> None:
        self._columns: list[list[str]] = []
        self._all_columns: list[list[str]] = []
        self._largest = 0  # bytes of the largest row group
        self._begins: list[list[int]] = []  # of every file, the number of the first record of every row group
        counts = []
        for path in paths:
            rows, columns = self._footer(path, names)
            self._columns.append(columns)
            self._begins.append([0, *itertools.accumulate(rows)][:-1])
            counts.append(sum(rows))
        self._groups: OrderedDict[tuple[int, int], pyarrow.Table] = OrderedDict()
        super().__init__(paths, counts)

    @property
    def bounds(self) -> Sequence[int]:
        files = zip(self.first_sample, self._begins, strict=True)
        return [*(first + begin for first, begins in files for begin in begins), len(self)]

    @property
    def window(self) -> int:  # type: ignore[override]
        # Records of one group alone would keep the file's own order from group to group.
        groups = sum(map(len, self._begins))
        # Of large ones fewer together: those of two windows, and the one that is being read, are kept at a time.
        together = min(GROUPS_TOGETHER, max(1, (KEPT_BYTES // max(self._largest, 1) - 1) // 2))
        return max(1, together * len(self) // groups)

    def columns(self, sample: int) -> list[str]:
        """Those that are not read as well."""
        return self._all_columns[self._find(sample)[0]]

    def read(self, sample: int, names: Sequence[str]) -> dict[str, bytes]:
        """The named columns of a record; `json` is all of them as JSON, bytes by names that can be asked for in turn.

        Raises BadSample: bad_text, read_error (bad content); DataUnreachable.
        """
        file, number = self._find(sample)
        begins = self._begins[file]
        group = max(place for place, begin in enumerate(begins) if begin <= number)
        table = self._group(file, group)
        places = {name: place for name in names if (place := named_column(name)) is not None}
        columns = {name: str(places[name][0]) if name in places else name for name in names}
        there = self._columns[file]
        wanted = there if RECORD in names else [name for name in there if name in columns.values()]
        try:
            record = {
                name: table.column(name)[number - begins[group]].as_py(maps_as_pydicts="lossy") for name in wanted
            }
        except UnicodeDecodeError:
            raise BadSample("bad_text", f"{self.key(sample)}: a text column is not UTF-8") from None
        found = {name: column_bytes(named_cell(record, places.get(name, [name]))) for name in names}
        if RECORD in names:
            found[RECORD] = record_bytes(record)
        return {name: value for name, value in found.items() if value is not None}

    def _footer(self, path: str, names: Sequence[str]) -> tuple[list[int], list[str]]:
        """(rows of every row group, columns to read)."""
        import pyarrow.parquet

        def read(file: _Watched) -> tuple[list[RowGroup], list[str]]:
            parquet = pyarrow.parquet.ParquetFile(file)
            groups = [parquet.metadata.row_group(i) for i in range(parquet.num_row_groups)]
            return groups, parquet.schema_arrow.names

        try:
            groups, columns = patiently(partial(_reading, path, read), path, MISTAKES)
        except (OSError, BadSample) as error:
            what = recognize(path) if isinstance(error, BadSample) else ""
            other = f"; it is {what}" if what not in ("", PARQUET_FILE) else ""
            raise ValueError(f"cannot read {path!r}: {one_line(error)}{other}") from None
        # Columns that nobody asked for may be images of megabytes, and are not read.
        wanted = columns if RECORD in names else [name for name in columns if name in names]
        if not wanted:
            raise ValueError(f"{path!r} has the columns {', '.join(columns)}, none of {', '.join(names)}; set `fields`")
        self._all_columns.append(columns)
        sizes = [_bytes_of(group, wanted) for group in groups]
        large = max(sizes, default=0)
        if large > MAX_GROUP_BYTES:
            raise ValueError(f"a row group of {path!r} has {large:,} bytes; write it with at most {MAX_GROUP_BYTES:,}")
        self._largest = max(self._largest, large)
        return [group.num_rows for group in groups], wanted

    def _group(self, file: int, group: int) -> pyarrow.Table:
        """One row group as an Arrow table. Raises BadSample: read_error; DataUnreachable."""
        import pyarrow.parquet

        if (file, group) not in self._groups:
            self._make_room()  # before it is read: what is kept and what comes would be there together

            def read(content: _Watched) -> pyarrow.Table:
                # The workers are the parallelism; threads of Arrow's own would compete with them.
                return pyarrow.parquet.ParquetFile(content).read_row_group(
                    group, columns=self._columns[file], use_threads=False
                )

            self._groups[file, group] = patiently(partial(_reading, self.paths[file], read), self.paths[file])
        self._groups.move_to_end((file, group))
        return self._groups[file, group]

    def _make_room(self) -> None:
        """Drop the row groups used longest ago, so that one more keeps the rest within `KEPT_BYTES`; one may stay."""
        while len(self._groups) > 1:
            sizes = [table.nbytes for table in self._groups.values()]
            # What comes may be as large as the largest, in memory or in its file.
            if len(sizes) < _KEPT and sum(sizes) + max(self._largest, *sizes) <= KEPT_BYTES:
                break
            self._groups.popitem(last=False)


class _Watched:
    """A file that remembers its own error: Arrow raises an OSError for bad content as well."""

    mode = "rb"

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.error: Exception | None = None

    @property
    def closed(self) -> bool:
        return self._file.closed

    def close(self) -> None:
        self._file.close()

    def tell(self) -> int:
        return self._file.tell()

    def seek(self, place: int, whence: int = 0) -> int:
        return self._file.seek(place, whence)

    def read(self, size: int = -1) -> bytes:
        try:
            return self._file.read(size)
        except Exception as error:
            self.error = error
            raise


def _reading(path: str, read: Callable[[_Watched], Read]) -> Read:
    """What `read` gives of a file. Raises BadSample, read_error, for bad content, and the file's own error as it is."""
    import pyarrow

    with open_binary(path) as file:
        watched = _Watched(file)
        try:
            return read(watched)
        except (OSError, pyarrow.ArrowException) as error:
            if watched.error is not None:
                raise watched.error from None
            raise BadSample("read_error", f"{path}: {one_line(error)}") from None


def _bytes_of(group: RowGroup, columns: Sequence[str]) -> int:
    """Bytes of these columns of a row group, not compressed."""
    parts = [group.column(number) for number in range(group.num_columns)]
    return sum(part.total_uncompressed_size for part in parts if part.path_in_schema.split(".")[0] in columns)


PARQUET = FormatSpec("parquet", endings=(".parquet", ".pq"), open=lambda paths, names, cache: Parquet(paths, names))
