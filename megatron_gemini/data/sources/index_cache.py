"""The index of a shard in a small file, so that a job lists ten thousand shards in seconds and opens few of them.

`x.tar.index.json` lies beside `x.tar`. Its first line is a summary, which is all that listing reads; with the second
one the file is one JSON object:

    {"summary": {"samples": ..., "bytes": ..., "mtime_ns": ..., "sha256": ..., "rejected": {}, "damage": "",
                 "format": 1},
     "members": [[name, offset, size], ...]}

It counts for a tar of `bytes` bytes that has not been written since `mtime_ns`. Where a copy has another time, it
counts if the headers still have the digest `sha256`. Any other is passed over, and the tar's own headers are read.

Without it, opening a source read every tar's headers and kept every name: minutes and gigabytes for ten thousand
shards. With it they take 2 seconds of a CPU and 277 MB (docs/performance.md).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_gemini.data.sources.tar_index import BLOCK, Member, TarIndex, index_tar, refusal

if TYPE_CHECKING:
    pass

FORMAT = 1
SUFFIX = ".index.json"
MAX_SUMMARY = 16 * 1024  # bytes: a file whose first line has no end is not read whole
WORTH_KEEPING = 1000  # members; the headers of fewer are read faster than a file is made
_PROBES = 64  # headers that are read to tell a tar; reading all of them is what the index saves


@dataclass(frozen=True)
class Summary:
    """What listing needs of a shard. bytes, mtime_ns, sha256: of the tar that it was made of; see `header_digest`."""

    samples: int
    bytes: int
    mtime_ns: int
    sha256: str
    rejected: dict[str, int] = field(default_factory=dict)
    damage: str = ""
    format: int = FORMAT


def sample_key(member_name: str) -> tuple[str, str]:
    """(key of the sample, ending of the member): `folder/name` up to the first dot of the file name, and the rest."""
    folder, _, file_name = member_name.rpartition("/")
    stem, _, ending = file_name.partition(".")
    return (f"{folder}/{stem}" if folder else stem), ending.lower()


def header_digest(path: str, members: Sequence[Member]) -> str:
    """SHA-256 of the headers of at most 64 members that are spread evenly over the tar.

    It is cheap, and a rewritten tar of the same length has another one, unless only contents of equal size were
    exchanged: then the index is still right.
    """
    digest = hashlib.sha256()
    step = max(1, -(-len(members) // _PROBES))
    with open(path, "rb", buffering=0) as file:
        for member in members[::step]:
            digest.update(os.pread(file.fileno(), BLOCK, member.offset - BLOCK))
    return digest.hexdigest()


def index_path(shard: str, folder: Path | None = None) -> Path:
    """Where the index of a shard lies: beside it, or in `folder` under a name made of its path."""
    if folder is None:
        return Path(shard + SUFFIX)
    where = hashlib.sha256(os.path.abspath(shard).encode()).hexdigest()[:32]
    return folder / f"{Path(shard).name}.{where}{SUFFIX}"


def write_index(shard: str, folder: Path | None = None, index: TarIndex | None = None) -> Summary:
    """Write the index of a shard, whole or not at all. index: what `index_tar(shard)` gives, where it is known.

    Raises OSError if the shard cannot be read or the place cannot be written to.
    """
    status = os.stat(shard)
    index = index or index_tar(shard)
    samples = len({sample_key(member.name)[0] for member in index.members})
    digest = header_digest(shard, index.members)
    summary = Summary(samples, status.st_size, status.st_mtime_ns, digest, dict(index.rejected), index.damage)
    path = index_path(shard, folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")  # several ranks may write the same one
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(f'{{"summary": {json.dumps(asdict(summary))},\n"members": ')
            json.dump([[member.name, member.offset, member.size] for member in index.members], file)
            file.write("}\n")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return summary


def read_summary(shard: str, folder: Path | None = None) -> Summary | None:
    """The summary of a shard that its index vouches for, or None. Reads one line."""
    for path in _places(shard, folder):
        try:
            with path.open("rb") as file:
                line = file.readline(MAX_SUMMARY)
            status = os.stat(shard)
        except OSError:
            continue
        summary = _summary(line)
        if summary is None or summary.bytes != status.st_size:
            continue
        if summary.mtime_ns == status.st_mtime_ns:
            return summary
        members = read_members(shard, summary, folder)  # a copy has another time
        if members is not None and header_digest(shard, members) == summary.sha256:
            return summary
    return None


def read_members(shard: str, summary: Summary, folder: Path | None = None) -> list[Member] | None:
    """The members that belong to a summary from `read_summary`; None if the file has changed or lies."""
    for path in _places(shard, folder):
        try:
            with path.open("rb") as file:
                if _summary(file.readline(MAX_SUMMARY)) == summary:
                    return _members(file.read(), summary.bytes)
        except OSError:
            continue
    return None


def _places(shard: str, folder: Path | None) -> list[Path]:
    return [index_path(shard), *([index_path(shard, folder)] if folder else [])]


def _summary(line: bytes) -> Summary | None:
    try:
        value = json.loads(line.rstrip().removesuffix(b",") + b"}")["summary"]
        summary = Summary(**value)
    # A file beside the shard may be anybody's: whatever is wrong with it, the tar itself is read instead.
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    numbers = (summary.samples, summary.bytes, summary.mtime_ns)
    if summary.format != FORMAT or any(type(number) is not int or number < 0 for number in numbers):
        return None
    texts = isinstance(summary.damage, str) and isinstance(summary.sha256, str)
    counts = isinstance(summary.rejected, dict) and all(type(count) is int for count in summary.rejected.values())
    return summary if texts and counts else None


def _members(rest: bytes, tar_bytes: int) -> list[Member] | None:
    """The members in the second line of an index, which is no more to be trusted than a tar."""
    try:
        members = [Member(*entry) for entry in json.loads(b"{" + rest)["members"]]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    for member in members:
        if not isinstance(member.name, str) or type(member.offset) is not int or type(member.size) is not int:
            return None
        if refusal(member.name, b"0", member.size) or not BLOCK <= member.offset <= tar_bytes - member.size:
            return None
    # An index that `write_index` made has no name twice, since `index_tar` refuses the second.
    return members if len({member.name for member in members}) == len(members) else None
