"""What a build starts from: records, here of the rows of a CSV, TSV, JSON-lines or parquet table."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, TypeAlias, cast

if TYPE_CHECKING:
    from megatron_gemini.config.schema import Plain

TABLES = (".csv", ".tsv", ".jsonl", ".parquet")
MAX_ROW_BYTES = 1024 * 1024
IMAGE_COLUMNS = ("image", "path", "file", "file_name", "filename", "image_path")
URL_COLUMNS = ("url",)
CAPTION_COLUMNS = ("caption", "text", "txt", "top_caption")
HASHES = ("sha256", "md5")
Row: TypeAlias = "dict[str, Plain]"
"""A row of a table, as far as JSON could hold it."""


@dataclass(frozen=True)
class Record:
    """One picture to be.

    image: a path, or an address if `is_url`. caption: the text itself, or the file that holds it. columns: what else
    the table says of it. hashes: what a download's bytes must hash to, by algorithm. problem: why the row is of no use,
    as a reason; empty when it is.
    """

    number: int
    image: str = ""
    is_url: bool = False
    caption: str | Path | None = None
    columns: Mapping[str, Plain] = field(default_factory=dict)
    hashes: Mapping[str, str] = field(default_factory=dict)
    problem: str = ""


@dataclass(frozen=True)
class Columns:
    """Which columns hold what; an empty name is looked for among the usual ones. root: the folder of relative paths."""

    image: str = ""
    url: str = ""
    caption: str = ""
    root: str = ""


def fingerprint(paths: Iterable[str | Path]) -> str:
    """SHA-256 of the names, sizes and times of files, of those that are there: what a restarted build compares."""
    digest = hashlib.sha256()
    for path in filter(os.path.exists, paths):
        found = os.stat(path)
        # Not the contents: reading a terabyte of pictures to go on with a build would take as long as the build.
        digest.update(
            f"{os.path.abspath(path)}\0{found.st_size}\0{found.st_mtime_ns}\0".encode(errors="surrogateescape")
        )
    return digest.hexdigest()


def table_records(path: str, columns: Columns) -> Iterator[Record]:
    """A record for every row of a table, in its order. Raises ValueError for a table that cannot be read or lacks
    a column."""
    rows = _rows(path)
    first = next((row for row in rows if isinstance(row, dict)), None)
    if first is None:
        raise ValueError(f"{path!r} has no row that can be read")
    chosen = _choose(path, first, columns)
    root = columns.root or os.path.dirname(path)
    for number, row in enumerate(_rows(path)):
        yield _record(number, row, chosen, root) if isinstance(row, dict) else Record(number, problem=row)


def row_count(path: str) -> int | None:
    """Rows of a table where that is known without reading it: of parquet."""
    if not path.endswith(".parquet"):
        return None
    parquet = _parquet_library(path)
    return parquet.read_metadata(path).num_rows


def _choose(path: str, row: Row, wanted: Columns) -> Columns:
    """`wanted` with every name that was left open filled in."""

    def find(name: str, usual: Sequence[str]) -> str:
        if name and name not in row:
            raise ValueError(f"{path!r} has no column {name!r}; it has {', '.join(map(str, row))}")
        return name or next((column for column in row if str(column).lower() in usual), "")

    image = find(wanted.image, () if wanted.url else IMAGE_COLUMNS)
    url = "" if image else find(wanted.url, URL_COLUMNS)
    caption = find(wanted.caption, CAPTION_COLUMNS)
    if not (image or url) or not caption:
        missing = "--caption-column" if image or url else "--image-column or --url-column"
        raise ValueError(f"which column of {path!r} to use is not clear; give {missing} one of {', '.join(row)}")
    return Columns(image, url, caption)


def _record(number: int, row: Row, columns: Columns, root: str) -> Record:
    place, caption = row.pop(columns.image or columns.url, None), row.pop(columns.caption, None)
    if not isinstance(place, str) or not place:
        return Record(number, problem="no_image")
    # What JSON has no number for, and what is nested or no text, is left behind.
    plain = {
        str(name): value
        for name, value in row.items()
        if isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value))
    }
    caption = caption if isinstance(caption, str) else None
    if columns.url:
        hashes = {name: str(row[name]).lower() for name in HASHES if row.get(name)}
        return Record(number, place, True, caption, plain, hashes)
    # Links are followed before the comparison: one in the folder may lead out of it.
    try:
        inside, path = os.path.realpath(root or "."), os.path.realpath(os.path.join(root, place))
    except ValueError:  # no file can be called so: a zero byte, half an emoji
        return Record(number, problem="path_outside")
    if os.path.commonpath([inside, path]) != inside:  # a table may name any file of the machine
        return Record(number, problem="path_outside")
    return Record(number, path, False, caption, plain)


def _rows(path: str) -> Iterator[Row | str]:
    """Rows as dicts; a reason in the place of one that cannot be read."""
    ending = os.path.splitext(path)[1].lower()
    if ending not in TABLES:
        raise ValueError(f"{path!r} is no table that can be read; there are {', '.join(TABLES)}")
    if ending == ".parquet":
        # In batches: a table of addresses and captions may not fit into memory.
        batches = _parquet_library(path).ParquetFile(path).iter_batches(batch_size=1024)
        return (row for batch in batches for row in batch.to_pylist())
    return _json_lines(path) if ending == ".jsonl" else _separated(path, "\t" if ending == ".tsv" else ",")


def _separated(path: str, delimiter: str) -> Iterator[Row | str]:
    csv.field_size_limit(MAX_ROW_BYTES)  # a quote that is never closed would read the rest of the file as one field
    with open(path, encoding="utf-8-sig", errors="replace", newline="") as file:
        reader = csv.reader(file, delimiter=delimiter)
        header = next(reader, [])
        if len(set(header)) < len(header):  # the second one would silently count
            raise ValueError(f"{path!r} has a column twice: {', '.join(header)}")
        while True:
            try:
                row = next(reader)
            except StopIteration:
                return
            except csv.Error:
                yield "bad_row"
                continue
            if row:  # an empty line is none
                yield dict(zip(header, row, strict=True)) if len(row) == len(header) else "bad_row"


def _json_lines(path: str) -> Iterator[Row | str]:
    with open(path, "rb") as file:
        while line := file.readline(MAX_ROW_BYTES + 1):
            if len(line) > MAX_ROW_BYTES:  # the rest of it is read away in pieces
                while line and not line.endswith(b"\n"):
                    line = file.readline(MAX_ROW_BYTES)
                yield "bad_row"
                continue
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            yield cast("Row", row) if isinstance(row, dict) else "bad_row"


def _parquet_library(path: str) -> ModuleType:
    """pyarrow.parquet, whose errors are ValueErrors or OSErrors."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"reading {path!r} needs pyarrow; pip install pyarrow, or give the table as CSV") from None
    return pyarrow.parquet
