"""Parquet: records by row group, of which the last used ones are kept."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_gemini.data.sources.columns import RECORD, column_bytes, named_cell, named_column, record_bytes
from megatron_gemini.data.sources.paths import open_binary
from megatron_gemini.data.sources.spec import FormatSpec
from megatron_gemini.data.sources.table import Table
from megatron_gemini.modalities.bad_sample import BadSample, one_line

if TYPE_CHECKING:
    import pyarrow

GROUPS_TOGETHER = 4  # row groups whose records are shuffled together
_KEPT = 2 * GROUPS_TOGETHER + 1  # some lanes begin a window while others finish the one before
MAX_GROUP_BYTES = 1024 * 1024 * 1024  # of which every worker keeps `_KEPT`


class Parquet(Table):
    """Parquet files, of which only the columns in `names` are read, or all of them if the whole record is.

    The footers are read at the start, a row group when a record of it is asked for. Raises ValueError naming the file
    when one cannot be read, has a row group above 1 GiB, or has none of the columns.
    """

    def __init__(self, paths: Sequence[str], names: Sequence[str]) -> None:
        self._columns: list[list[str]] = []
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
        return max(1, GROUPS_TOGETHER * len(self) // groups)

    def read(self, sample: int, names: Sequence[str]) -> dict[str, bytes]:
        """The named columns of a record; `json` is all of them as JSON, bytes by names that can be asked for in turn.

        Raises BadSample: bad_text, read_error.
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
            record = {name: table.column(name)[number - begins[group]].as_py() for name in wanted}
        except UnicodeDecodeError:
            raise BadSample("bad_text", f"{self.key(sample)}: a text column is not UTF-8") from None
        found = {name: column_bytes(named_cell(record, places.get(name, [name]))) for name in names}
        if RECORD in names:
            found[RECORD] = record_bytes(record)
        return {name: value for name, value in found.items() if value is not None}

    def _footer(self, path: str, names: Sequence[str]) -> tuple[list[int], list[str]]:
        """(rows of every row group, columns to read)."""
        import pyarrow.parquet

        try:
            with open_binary(path) as file:
                parquet = pyarrow.parquet.ParquetFile(file)
                groups = [parquet.metadata.row_group(i) for i in range(parquet.num_row_groups)]
                columns = parquet.schema_arrow.names
        except (OSError, pyarrow.ArrowException) as error:
            raise ValueError(f"cannot read {path!r}: {one_line(error)}") from None
        large = max((group.total_byte_size for group in groups), default=0)
        if large > MAX_GROUP_BYTES:
            raise ValueError(f"a row group of {path!r} has {large:,} bytes; write it with at most {MAX_GROUP_BYTES:,}")
        # Columns that nobody asked for may be images of megabytes, and are not read.
        wanted = columns if RECORD in names else [name for name in columns if name in names]
        if not wanted:
            raise ValueError(f"{path!r} has the columns {', '.join(columns)}, none of {', '.join(names)}; set `fields`")
        return [group.num_rows for group in groups], wanted

    def _group(self, file: int, group: int) -> pyarrow.Table:
        """One row group as an Arrow table. Raises BadSample: read_error."""
        import pyarrow.parquet

        if (file, group) not in self._groups:
            try:
                with open_binary(self.paths[file]) as content:
                    # The workers are the parallelism; threads of Arrow's own would compete with them.
                    table = pyarrow.parquet.ParquetFile(content).read_row_group(
                        group, columns=self._columns[file], use_threads=False
                    )
            except (OSError, pyarrow.ArrowException) as error:
                raise BadSample("read_error", f"{self.paths[file]}, row group {group}: {one_line(error)}") from None
            self._groups[file, group] = table
            while len(self._groups) > _KEPT:
                self._groups.popitem(last=False)
        self._groups.move_to_end((file, group))
        return self._groups[file, group]


PARQUET = FormatSpec("parquet", endings=(".parquet", ".pq"), open=lambda paths, names, cache: Parquet(paths, names))
