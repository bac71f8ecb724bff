"""What a build has done so far, in small files, so that a killed one goes on and ends with the same shards."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, cast

from megatron_gemini.data.sources.shard_writer import write_json

if TYPE_CHECKING:
    from megatron_gemini.config.schema import Plain
    from megatron_gemini.data.samples.decode_json import Json

VALIDATION = "validation"
"""The folder, beside the shards, of those that are held out: no pattern for the former finds the latter."""


@dataclass
class Dropped:
    """Records left out since the shard before: how many by reason, and what was said of the first."""

    counts: dict[str, int] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)

    def add(self, reason: str, detail: str) -> None:
        self.counts[reason] = self.counts.get(reason, 0) + 1
        # Names of files may have bytes that are no text, which no terminal prints.
        self.first.setdefault(reason, detail.encode("utf-8", "replace").decode())

    def merge(self, other: Dropped) -> None:
        self.counts = dict(Counter(self.counts) + Counter(other.counts))
        self.first = {**other.first, **self.first}


@dataclass(frozen=True)
class KeptSample:
    """A sample of a shard. picture: its difference hash in hexadecimal digits."""

    sha256: str
    picture: str
    width: int
    height: int
    characters: int
    bytes: int


class _SavedDropped(TypedDict):
    counts: dict[str, int]
    first: dict[str, str]


class _SavedSample(TypedDict):
    sha256: str
    picture: str
    width: int
    height: int
    characters: int
    bytes: int


class _Saved(TypedDict):
    """A `JournalEntry` as JSON."""

    shard: str
    shard_bytes: int
    held_out_bytes: int
    next_record: int
    samples: list[_SavedSample]
    held_out: list[_SavedSample]
    dropped: _SavedDropped


@dataclass(frozen=True)
class JournalEntry:
    """A shard that is whole, with the shard of what was held out of its records.

    shard: the name of both, '' for the records after the last one. Of a side without samples there is no file, of 0
    bytes. next_record: where to go on.
    """

    shard: str
    shard_bytes: int
    held_out_bytes: int
    next_record: int
    samples: tuple[KeptSample, ...]
    held_out: tuple[KeptSample, ...]
    dropped: Dropped


class Journal:
    """Entries of the build in `folder`, read back if they are of the same build and their shards are there.

    identity: what decides the result (inputs and options), plain JSON.
    Raises ValueError when the folder has another build.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Json]) -> None:
        self.folder, self._own = folder, folder / ".build"
        self.entries: list[JournalEntry] = []
        self._own.mkdir(parents=True, exist_ok=True)
        # Compared as JSON has it: tuples of the options are lists in the file.
        state, plain = self._own / "build.json", json.loads(json.dumps(identity))
        if not state.exists():
            write_json(state, plain)
        elif (found := _read(state)) != plain:
            names = [name for name in plain if not isinstance(found, dict) or found.get(name) != plain[name]]
            raise ValueError(
                f"{str(folder)!r} holds a build with other {' and '.join(names) or 'settings'}; "
                "choose another --out, or delete it to build anew"
            )
        # In order, up to the first that is missing or whose shard is: what comes after it is built again, the same.
        while entry := self._entry(len(self.entries)):
            self.entries.append(entry)
        self._forget()

    @property
    def is_complete(self) -> bool:
        return bool(self.entries) and not self.entries[-1].shard

    def add(self, entry: JournalEntry) -> None:
        """Record that a shard is whole; called after it is."""
        # Whole or absent (`write_json`), as the shard is: a killed build has no entry without its shard.
        write_json(self._own / f"{len(self.entries):06d}.json", asdict(entry))
        self.entries.append(entry)

    def _forget(self) -> None:
        """Delete what is there of the entries after the last one, and their shards.

        A download may fail this time, so that what is built now ends elsewhere. An old entry after a new one would then
        leave records out, or have them twice.
        """
        for path in self._own.glob("[0-9]*.json"):
            if path.stem.isdigit() and int(path.stem) >= len(self.entries):
                entry = _read(path)
                shard = entry.get("shard") if isinstance(entry, dict) else None
                # A name only: what is written there is not believed to be a file of this folder's.
                if isinstance(shard, str) and shard.endswith(".tar") and os.path.basename(shard) == shard:
                    for place in (self.folder, self.folder / VALIDATION):
                        (place / shard).unlink(missing_ok=True)
                path.unlink()

    def _entry(self, number: int) -> JournalEntry | None:
        value = cast("_Saved", _read(self._own / f"{number:06d}.json"))
        try:  # as it was written, or whatever a full disk has left of it
            dropped = Dropped(**value["dropped"])
            samples, held_out = (
                tuple(KeptSample(**sample) for sample in value[side]) for side in ("samples", "held_out")
            )
            sizes = value["shard_bytes"], value["held_out_bytes"]
            entry = JournalEntry(value["shard"], *sizes, value["next_record"], samples, held_out, dropped)
            files = (self.folder / entry.shard, self.folder / VALIDATION / entry.shard)
            sides = zip(files, sizes, strict=True)
            whole = not entry.shard or all(not size or file.stat().st_size == size for file, size in sides)
        except (KeyError, TypeError, AttributeError, OSError):
            return None
        return entry if whole else None


def _read(path: Path) -> Plain:
    try:
        return cast("Plain", json.loads(path.read_bytes()))
    except (OSError, ValueError):
        return None
