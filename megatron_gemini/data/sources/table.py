"""What the files of tables have in common: a record has columns, and no name of its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePosixPath

from megatron_gemini.data.samples.decode_json import decode_json
from megatron_gemini.data.sources.columns import RECORD
from megatron_gemini.data.sources.files import NumberedFiles


class Table(NumberedFiles):
    """Records of a list of files, numbered through. A record's key is `file/number in the file`.

    Raises ValueError naming a file without a record.
    """

    def __init__(self, paths: Sequence[str], counts: Sequence[int]) -> None:
        for path, count in zip(paths, counts, strict=True):
            if not count:
                raise ValueError(f"{path!r} holds no record; leave it out of the data source")
        super().__init__(paths, counts)

    def endings(self, sample: int) -> list[str]:
        """The name of the whole record: which columns it has is known only once it is read."""
        return [RECORD]

    def columns(self, sample: int) -> list[str]:
        """Names of the columns that a record has. Raises BadSample."""
        record = decode_json(self.read(sample, [RECORD]).get(RECORD, b"{}"))
        return list(record) if isinstance(record, dict) else []

    def read(self, sample: int, names: Sequence[str]) -> dict[str, bytes]:
        """As `spec.Records.read`: every format has its own."""
        raise NotImplementedError

    def key(self, sample: int) -> str:
        file, number = self._find(sample)
        return f"{PurePosixPath(self.paths[file]).stem}/{number}"
