"""A toy file format: tables of comma-separated values, whose first line names the columns."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence

from megatron_gemini.data.sources.columns import RECORD
from megatron_gemini.data.sources.spec import FormatSpec
from megatron_gemini.data.sources.table import Table


class CommaSeparated(Table):
    """Files that fit into memory. Raises ValueError that names one without a record."""

    def __init__(self, paths: Sequence[str]) -> None:
        self._records: list[list[dict[str, str]]] = []
        for path in paths:
            with open(path, newline="", encoding="utf-8") as file:
                self._records.append(list(csv.DictReader(file)))
        super().__init__(paths, [len(records) for records in self._records])

    def read(self, sample: int, names: Sequence[str]) -> dict[str, bytes]:
        """The named columns of a record that are not empty; `json` is all of it."""
        file, number = self._find(sample)
        record = self._records[file][number]
        found = {name: record[name].encode() for name in names if record.get(name)}
        return found | ({RECORD: json.dumps(record).encode()} if RECORD in names else {})


CSV = FormatSpec("csv", endings=(".csv",), open=lambda paths, names, cache: CommaSeparated(paths))
