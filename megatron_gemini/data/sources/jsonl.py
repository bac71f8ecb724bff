"""JSON lines: one record a line, found by the places of every 16th line, half a byte of memory a record."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import BinaryIO

import numpy as np

from megatron_gemini.data.samples.decode_json import decode_json
from megatron_gemini.data.sources.columns import RECORD, column_bytes
from megatron_gemini.data.sources.paths import open_binary
from megatron_gemini.data.sources.recognize import JSON_LINES, recognize
from megatron_gemini.data.sources.spec import FormatSpec
from megatron_gemini.data.sources.storage import MISTAKES, patiently
from megatron_gemini.data.sources.table import Table
from megatron_gemini.modalities.bad_sample import BadSample

MAX_LINE = 16 * 1024 * 1024
_STEP = 16  # lines a mark: half a byte of memory a record, for 15 lines that are read in vain at most
_PIECE = 4 * 1024 * 1024


class JsonLines(Table):
    """Files of JSON lines; an empty line is a record that cannot be used.

    Raises ValueError naming the file when one cannot be read or is empty.
    """

    def __init__(self, paths: Sequence[str]) -> None:
        self._marks: list[np.ndarray] = []  # of every file, where the lines 0, 16, 32, ... begin
        counts = []
        for path in paths:
            try:
                what = patiently(partial(recognize, path), path, MISTAKES)
                if what not in ("", JSON_LINES):
                    raise ValueError(f"{path!r} is {what}")
                marks, count = patiently(partial(_lines_of, path), path, MISTAKES)
            except OSError as error:
                raise ValueError(f"cannot read {path!r}: {error.strerror or error}") from None
            self._marks.append(marks)
            counts.append(count)
        super().__init__(paths, counts)

    def read(self, sample: int, names: Sequence[str]) -> dict[str, bytes]:
        """The named columns of a record; `json` is the whole line.

        Raises BadSample: bad_json, text_too_large (a line above 16 MiB); DataUnreachable.
        """
        file, number = self._find(sample)
        line = patiently(partial(self._line, file, number), self.paths[file])
        record = decode_json(line)
        if not isinstance(record, dict):
            raise BadSample("bad_json", f"{self.key(sample)}: a line holds one {{...}} with the record's columns")
        found = {name: column_bytes(record[name]) for name in names if name in record}
        if RECORD in names:
            found[RECORD] = line
        return {name: value for name, value in found.items() if value is not None}

    def _line(self, file: int, number: int) -> bytes:
        with open_binary(self.paths[file]) as lines:
            lines.seek(int(self._marks[file][number // _STEP]))
            for _ in range(number % _STEP):  # piece by piece, as a line of a hostile file may be as long as the file
                while piece := lines.readline(_PIECE):
                    if piece.endswith(b"\n"):
                        break
            line = lines.readline(MAX_LINE + 1)
        if len(line) > MAX_LINE:
            raise BadSample("text_too_large", f"line {number + 1} of {self.paths[file]} is longer than {MAX_LINE:,}")
        return line


def _lines_of(path: str) -> tuple[np.ndarray, int]:
    with open_binary(path) as file:
        return find_lines(file)


def find_lines(file: BinaryIO) -> tuple[np.ndarray, int]:
    """(int64 places of the lines 0, 16, 32, ..., number of lines); a last line needs no line feed."""
    # By numpy over pieces of megabytes: a loop over lines would cost more than reading them.
    marks, begins, place = [np.zeros(1, np.int64)], 1, 0  # `begins`: beginnings of lines found so far
    ended = True
    while piece := file.read(_PIECE):
        feeds = np.flatnonzero(np.frombuffer(piece, np.uint8) == 10).astype(np.int64)
        marks.append(place + feeds[-begins % _STEP :: _STEP] + 1)
        begins += len(feeds)
        place += len(piece)
        ended = piece.endswith(b"\n")
    lines = begins - 1 if ended else begins
    return np.concatenate(marks)[: -(-lines // _STEP)], lines


JSONL = FormatSpec("jsonl", endings=(".jsonl", ".ndjson"), open=lambda paths, names, cache: JsonLines(paths))
