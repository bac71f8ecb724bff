"""Records of the pictures in folders."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from megatron_gemini.building.captions import CaptionOrigin
from megatron_gemini.building.records import Record

IMAGE_FILES = (
    ".png",
    ".apng",
    ".jpg",
    ".jpeg",
    ".jpe",
    ".jfif",
    ".webp",
    ".gif",
    ".bmp",
    ".tif",
    ".tiff",
    ".avif",
)


def folder_records(
    folders: Sequence[str], captions: CaptionOrigin, out: Path | None = None
) -> tuple[list[Record], dict[str, int]]:
    """(a record for every picture below the folders, in the order of their names; what else is there, by kind).

    What else is there is counted by its ending. The text of a picture's caption is none of it, nor is the folder `out`.
    Raises ValueError if there is no picture.
    """
    records: list[Record] = []
    others: Counter[str] = Counter()
    own = os.path.realpath(out) if out else ""
    for folder in folders:
        if not os.path.isdir(folder):
            raise ValueError(f"{folder!r} is no folder; --images takes folders of pictures")
        unreadable: list[OSError] = []
        for place, folders_below, names in os.walk(folder, onerror=unreadable.append):
            # os.walk follows this list, in whose order the file system gave it.
            folders_below[:] = sorted(name for name in folders_below if os.path.realpath(Path(place, name)) != own)
            # A link could lead back to where it is, or out of the folder, and is not followed.
            others["linked folders"] += sum(os.path.islink(Path(place, name)) for name in folders_below)
            pictures = [Path(place, name) for name in sorted(names) if name.lower().endswith(IMAGE_FILES)]
            for path in pictures:
                records.append(Record(len(records), str(path), caption=captions.of(path)))
            read = {str(path) for path in [*pictures, *map(captions.of, pictures)]}
            others.update(_ending(name) for name in names if os.path.join(place, name) not in read)
        others["folders that cannot be read"] += len(unreadable)
    passed_over = dict((+others).most_common())
    if not records:
        seen = ", ".join(f"{count:,} {kind}" for kind, count in passed_over.items())
        raise ValueError(
            f"there is no picture ({', '.join(IMAGE_FILES)}) below {', '.join(folders)}"
            + (f", but {seen}" if seen else "")
        )
    return records, passed_over


def _ending(name: str) -> str:
    ending = os.path.splitext(name)[1].lower()
    return ending if 1 < len(ending) <= 12 and ending[1:].isalnum() else "without a usual ending"
