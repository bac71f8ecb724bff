"""What a build has done so far, in small files, so that a killed one goes on and ends with the same shards."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypedDict, cast

from megatron_gemini.config.schema import Plain
from megatron_gemini.data.sources.shard_writer import write_json


@dataclass
class Dropped:
    """Records left out since the shard before: how many by reason, and what was said of the first."""

    counts: dict[str, int] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)

    def add(self, reason: str, detail: str) -> None:
        self.counts[reason] = self.counts.get(reason, 0) + 1
        self.first.setdefault(reason, detail)

    def merge(self, other: Dropped) -> None:
        self.counts = dict(Counter(self.counts) + Counter(other.counts))
        # `other` came later, so it is not the first of a reason that is known already.
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


@dataclass(frozen=True)
class JournalEntry:
    """A shard that is whole. shard: its name, '' for the records after the last one. next_record: where to go on."""

    shard: str
    shard_bytes: int
    next_record: int
    samples: tuple[KeptSample, ...]
    dropped: Dropped


class _StoredDropped(TypedDict):
    counts: dict[str, int]
    first: dict[str, str]


class _StoredSample(TypedDict):
    sha256: str
    picture: str
    width: int
    height: int
    characters: int
    bytes: int


class _StoredEntry(TypedDict):
    shard: str
    shard_bytes: int
    next_record: int
    samples: list[_StoredSample]
    dropped: _StoredDropped


class Journal:
    """Entries of the build in `folder`, read back if they are of the same build and their shards are there.

    identity: what decides the result (inputs and options), plain JSON.
    Raises ValueError when the folder has another build.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Plain]) -> None:
        self.folder, self._own = folder, folder / ".build"
        self.entries: list[JournalEntry] = []
        self._own.mkdir(parents=True, exist_ok=True)
        # Through JSON and back, since what it is compared with was read from a file: there, tuples are lists.
        state, plain = self._own / "build.json", json.loads(json.dumps(identity))
        if not state.exists():
            write_json(state, plain)
        elif (found := _read(state)) != plain:
            names = [name for name in plain if not isinstance(found, dict) or found.get(name) != plain[name]]
            raise ValueError(
                f"{str(folder)!r} holds a build with other {' and '.join(names) or 'settings'}; "
                "choose another --out, or delete it to build anew"
            )
        while entry := self._entry(len(self.entries)):
            self.entries.append(entry)

    @property
    def is_complete(self) -> bool:
        return bool(self.entries) and not self.entries[-1].shard

    def add(self, entry: JournalEntry) -> None:
        """Record that a shard is whole; called after it is."""
        write_json(self._own / f"{len(self.entries):06d}.json", asdict(entry))
        self.entries.append(entry)

    def _entry(self, number: int) -> JournalEntry | None:
        # Taken for whole here; what a damaged file lacks is an error below.
        value = cast("_StoredEntry", _read(self._own / f"{number:06d}.json"))
        try:
            dropped = Dropped(**value["dropped"])
            samples = tuple(KeptSample(**sample) for sample in value["samples"])
            entry = JournalEntry(value["shard"], value["shard_bytes"], value["next_record"], samples, dropped)
            # A shard that is gone or cut off is built anew, and with it all that follow.
            whole = not entry.shard or (self.folder / entry.shard).stat().st_size == entry.shard_bytes
        except (KeyError, TypeError, AttributeError, OSError):
            return None
        return entry if whole else None


def _read(path: Path) -> Plain:
    try:
        return cast("Plain", json.loads(path.read_bytes()))
    except (OSError, ValueError):
        return None
