"""What a source reads from, whatever its files are: samples by number, each a dict of named bytes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from megatron_gemini.config.data import SourceConfig
from megatron_gemini.data.sources.paths import expand_shards, is_url

RECORD = "json"  # the name under which a table gives the whole record, as a tar its metadata


class Records(Protocol):
    """Samples of a list of files, numbered through.

    first_sample: number of the first sample of every file. bounds: where blocks of samples that are cheap to read
    together begin, and the number of all; window: samples worth shuffling together, 0 for no preference.
    rejected: what was left out, by reason. damage: files that break off, by path.
    """

    paths: list[str]
    first_sample: list[int]
    rejected: dict[str, int]
    damage: dict[str, str]

    def __len__(self) -> int: ...

    @property
    def keys(self) -> Sequence[str]: ...

    @property
    def bounds(self) -> Sequence[int]: ...

    @property
    def window(self) -> int: ...

    def endings(self, sample: int) -> list[str]:
        """Names of the sample's members; of a table, of the whole record alone."""

    def path(self, sample: int) -> str:
        """The file that holds the sample."""

    def read(self, sample: int, names: Sequence[str]) -> dict[str, bytes]:
        """Those of the named members or columns that the sample has. Raises BadSample."""


def open_records(source: SourceConfig, names: Sequence[str], cache: Path | None = None) -> Records:
    """The records of a source. names: what will be read of them. cache: folder for indices that take long to make."""
    from megatron_gemini.data.sources.jsonl import JsonLines
    from megatron_gemini.data.sources.parquet import Parquet
    from megatron_gemini.data.sources.shards import Shards
    from megatron_gemini.data.sources.tars import RemoteTars

    paths = expand_shards(source.shards)
    kind = source.format if source.format != "auto" else _format(paths)
    if kind == "jsonl":
        return JsonLines(paths)
    if kind == "parquet":
        return Parquet(paths, names)
    return RemoteTars(paths) if any(map(is_url, paths)) else Shards(paths, cache)


def _format(paths: Sequence[str]) -> str:
    endings = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet", ".pq": "parquet"}
    kinds = {endings.get(Path(path).suffix.lower(), "webdataset") for path in paths}
    if len(kinds) > 1:
        raise ValueError(
            f"{paths[0]!r} and others are {' and '.join(sorted(kinds))} files; make two data sources of them"
        )
    return kinds.pop()


def column_bytes(value: Any) -> bytes | None:
    """A column's value as a member's content: text in UTF-8, other plain data as JSON, None where there is nothing.

    A mapping with "bytes" is that content: so tables of the Hugging Face hub hold images and sounds.
    """
    if isinstance(value, dict) and isinstance(value.get("bytes"), bytes):
        value = value["bytes"]
    if value is None or isinstance(value, bytes):
        return value
    if isinstance(value, str):
        return value.encode("utf-8", "surrogatepass")  # which decoding refuses, and counts
    return json.dumps(value, default=str).encode()
