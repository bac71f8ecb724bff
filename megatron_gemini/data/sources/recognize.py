"""What a file is by its first bytes, for whoever gave one that cannot be read as it is."""

from __future__ import annotations

import codecs
import re

from megatron_gemini.data.sources.paths import open_binary

HEAD = 512
JSON_LINES = "a file of JSON lines"
PARQUET = "a parquet file"
_SIGNS = {
    b"\x1f\x8b": "compressed with gzip, and samples are read in any order: unpack it with gunzip",
    b"\x28\xb5\x2f\xfd": "compressed with zstd, and samples are read in any order: unpack it with unzstd",
    b"\xfd7zXZ": "compressed with xz, and samples are read in any order: unpack it with unxz",
    b"BZh": "compressed with bzip2, and samples are read in any order: unpack it with bunzip2",
    b"PK\x03\x04": "a zip file: write its files into tars",
    b"ARROW1": "an Arrow file: write it as parquet",
    b"\xff\xff\xff\xff": "an Arrow stream: write it as parquet",
    b"PAR1": PARQUET,
    codecs.BOM_UTF16_LE: "UTF-16 text: write it as UTF-8",
    codecs.BOM_UTF16_BE: "UTF-16 text: write it as UTF-8",
    b"SQLite format 3": "an SQLite database: write its rows as JSON lines",
}


def recognize(path: str) -> str:
    """What the file is, in words, with the way out where nothing reads it; empty for a tar and what is not known.

    Raises OSError if it cannot be read.
    """
    with open_binary(path) as file:
        head = file.read(HEAD)
    # By content: a name ends in .json or .tar whatever is behind it.
    found = next((words for sign, words in _SIGNS.items() if head.startswith(sign)), "")
    text = head.removeprefix(codecs.BOM_UTF8)
    if re.match(rb"\s*\[\s*[{\[]", text):
        return "one JSON array: write its entries as lines, as in jq -c '.[]' x.json > x.jsonl"
    if re.match(rb'\s*\{\s*"', text):
        return JSON_LINES
    return found
