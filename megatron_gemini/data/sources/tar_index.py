"""What a tar holds, from its headers alone: names, offsets and sizes, nothing extracted and nothing executed."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

from megatron_gemini.data.sources.paths import open_binary

BLOCK = 512
MAX_MEMBER_BYTES = 256 * 1024 * 1024
MAX_MEMBERS = 2_000_000
MAX_NAME_BYTES = 1024
MAX_EXTENDED_HEADER = 64 * 1024
_REGULAR = b"0\x007"
_LINKS = b"12"
_FOLDER = b"5"


@dataclass(frozen=True)
class Member:
    """A regular file in a tar. Its name is a key to look up, never a path to write to."""

    name: str
    offset: int
    size: int


@dataclass
class TarIndex:
    """`members` in file order; `rejected` counts by reason; `damage` says in words where reading stopped early."""

    members: list[Member] = field(default_factory=list)
    rejected: Counter[str] = field(default_factory=Counter)
    damage: str = ""


# The standard library's tarfile takes a broken header for the end of the tar, and so hides what is lost.
class _Damaged(Exception):
    """The rest of the tar cannot be trusted."""


def index_tar(path: str, max_member_bytes: int = MAX_MEMBER_BYTES) -> TarIndex:
    """Walk the headers of an uncompressed tar (ustar, GNU or pax).

    Links, devices, absolute names, names with `..`, duplicates and members above `max_member_bytes` are left out and
    counted. A tar that breaks off gives what is whole before the break and says so in `damage`.
    """
    index, seen = TarIndex(), set()
    with open_binary(path) as file:
        try:
            for name, kind, offset, size in _walk(file):
                reason = refusal(name, kind, size, max_member_bytes)
                if not reason and name in seen:
                    reason = "tar_duplicate"
                if reason:
                    index.rejected[reason] += 1
                elif kind in _REGULAR:
                    seen.add(name)
                    index.members.append(Member(name, offset, size))
                    if len(index.members) > MAX_MEMBERS:  # which cost a hostile tar half a kilobyte each
                        raise _Damaged(f"more than {MAX_MEMBERS:,} members")
        except _Damaged as damage:
            index.damage = str(damage)
            index.rejected["tar_damaged"] += 1
    return index


def refusal(name: str, kind: bytes, size: int, max_member_bytes: int = MAX_MEMBER_BYTES) -> str:
    """Why a member is left out; empty when it is not."""
    if kind == _FOLDER:  # says nothing, and is no loss
        return ""
    if kind not in _REGULAR:
        return "tar_link" if kind in _LINKS else "tar_special_file"
    # Nothing here writes to a name, but it becomes a key, in messages and states, and other tools unpack shards.
    if not name or name.startswith("/") or "\\" in name or not name.isprintable() or ".." in name.split("/"):
        return "tar_unsafe_name"
    return "tar_member_too_large" if size > max_member_bytes else ""


def _walk(file: BinaryIO) -> Iterator[tuple[str, bytes, int, int]]:
    """(name, type flag, offset of the data, size) of every member whose data is all there."""
    end = file.seek(0, os.SEEK_END)
    position, long_name, extended = 0, "", {}
    while position < end:
        header = _read(file, position, BLOCK)
        if not header.strip(b"\0"):
            return
        kind, size = header[156:157], _checked_size(header, position)
        offset, position = position + BLOCK, position + BLOCK + (size + BLOCK - 1) // BLOCK * BLOCK
        if kind in b"LKxg":
            if size > MAX_EXTENDED_HEADER:  # before it is read: it holds a name, and may claim any size
                raise _Damaged(f"an extended header of {size:,} bytes at byte {offset - BLOCK:,}")
            content = _read(file, offset, size)
            if kind == b"L":
                long_name = _text(content)
            elif kind == b"x":
                extended = _pax_records(content)
            continue
        if "size" in extended:  # which counts instead of the header's, so that sizes above 8 GiB can be said
            size = _decimal(extended["size"])
            position = offset + (size + BLOCK - 1) // BLOCK * BLOCK
        if offset + size > end:
            raise _Damaged(f"it breaks off at byte {end:,}, within a member")
        name, prefix = _text(header[:100]), _text(header[345:500])
        if prefix and header[257:263] == b"ustar\0":
            name = f"{prefix}/{name}"
        name = (extended.get("path") or long_name or name).removeprefix("./")  # as `tar cf x.tar .` writes names
        long_name, extended = "", {}
        yield name if len(name) <= MAX_NAME_BYTES else "", kind, offset, size  # an empty name is refused
    raise _Damaged(f"it breaks off at byte {end:,}, without an end marker")


def _read(file: BinaryIO, offset: int, size: int) -> bytes:
    file.seek(offset)
    data = file.read(size)
    if len(data) < size:
        raise _Damaged(f"it breaks off at byte {offset + len(data):,}, within a header")
    return data


def _checked_size(header: bytes, position: int) -> int:
    """The data size of a header whose checksum is right."""
    stored, size = header[148:156], header[124:136]
    total = sum(header) - sum(stored) + 8 * ord(" ")
    try:
        if int(stored.strip(b" \0") or b"0", 8) != total:
            raise ValueError("checksum")
        # GNU: the top bit marks a big-endian binary number, for sizes from 8 GiB on.
        return int.from_bytes(size[1:], "big") if size[0] & 0x80 else int(size.strip(b" \0") or b"0", 8)
    except ValueError:
        raise _Damaged(f"no tar header at byte {position:,}") from None


def _pax_records(content: bytes) -> dict[str, str]:
    """`length key=value` lines, where the length counts the whole line."""
    records, position = {}, 0
    while position < len(content.rstrip(b"\0")):
        length_text, _, rest = content[position:].partition(b" ")
        length = _decimal(length_text.decode("ascii", "replace"))
        if not len(length_text) + 2 < length <= len(content) - position:
            raise _Damaged("a broken pax header")
        key, _, value = rest[: length - len(length_text) - 2].partition(b"=")
        records[_text(key)] = _text(value)
        position += length
    return records


def _decimal(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise _Damaged("a broken pax header")
    return int(text)


def _text(data: bytes) -> str:
    return data.split(b"\0", 1)[0][: MAX_NAME_BYTES + 1].decode("utf-8", "replace")
