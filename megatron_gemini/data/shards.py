"""WebDataset-style shards: tars in which members that share a key are one sample, readable in any order."""

from __future__ import annotations

import difflib
import glob
import itertools
import os
import re
from collections.abc import Sequence
from pathlib import Path

from megatron_gemini.data.tar_index import Member, index_tar
from megatron_gemini.modalities.bad_sample import BadSample

MAX_TEXT_BYTES = 1024 * 1024
_TEXT_ENDINGS = ("txt", "json")
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_MAX_SHARDS = 1_000_000


def expand_shards(pattern: str) -> list[str]:
    """Paths of the shards, sorted: globs are matched, {000..015} counts with the width of its first number.

    Raises ValueError when nothing matches, naming the nearest files that exist, and when a counted shard is missing.
    """
    if not pattern:
        raise ValueError("a data source has no shards; set its `shards` to a path such as data/train-{000..015}.tar")
    paths: list[str] = []
    for name in _expand_ranges(pattern):
        found = sorted(glob.glob(name)) if glob.has_magic(name) else [name] if os.path.isfile(name) else []
        if not found:
            raise ValueError(f"no shard matches {name!r}{_nearest(name)}")
        paths += found
    return sorted(dict.fromkeys(paths))


def _expand_ranges(pattern: str) -> list[str]:
    parts = _RANGE.split(pattern)  # text, first, last, text, first, last, ..., text
    choices: list[Sequence[str]] = [[parts[0]]]
    total = 1
    for first, last, text in zip(parts[1::3], parts[2::3], parts[3::3], strict=True):
        count = int(last) - int(first) + 1
        total *= max(count, 0)
        if not 0 < total <= _MAX_SHARDS:
            raise ValueError(f"the range {{{first}..{last}}} of {pattern!r} gives {total:,} shards; write {{000..015}}")
        choices.append([f"{number:0{len(first)}d}{text}" for number in range(int(first), int(last) + 1)])
    return ["".join(choice) for choice in itertools.product(*choices)]


def _nearest(name: str) -> str:
    """What exists that the user may have meant, as the end of an error message."""
    folder = Path(name).parent
    while not folder.is_dir():
        if "*" not in folder.name and "?" not in folder.name:
            return f"; the folder {str(folder)!r} does not exist (paths are relative to {os.getcwd()!r})"
        folder = folder.parent
    tars = sorted(entry.name for entry in itertools.islice(folder.iterdir(), 10_000) if entry.name.endswith(".tar"))
    near = difflib.get_close_matches(Path(name).name, tars, n=3, cutoff=0.3) or tars[:3]
    if not near:
        return f"; the folder {str(folder)!r} holds no .tar files"
    return f"; the nearest that exist: {', '.join(str(folder / tar) for tar in near)}"


class Shards:
    """The samples of a list of shards, each with random access.

    keys: `folder/name` of every sample, up to the first dot of its file name; members are named by what follows.
    rejected: members that were left out, by reason. damage: shards that break off, by path.
    Raises ValueError naming the shard when one cannot be opened or holds no usable member.
    """

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = list(paths)
        self.keys: list[str] = []
        self.rejected: dict[str, int] = {}
        self.damage: dict[str, str] = {}
        self.first_sample: list[int] = []  # of every shard
        self._samples: list[tuple[int, dict[str, Member]]] = []  # (shard, members by ending)
        for number, path in enumerate(self.paths):
            self.first_sample.append(len(self.keys))
            self._open(number, path)

    @classmethod
    def from_pattern(cls, pattern: str) -> Shards:
        """Shards that a path with globs and ranges names, as `expand_shards` does."""
        return cls(expand_shards(pattern))

    def __len__(self) -> int:
        return len(self.keys)

    def _open(self, number: int, path: str) -> None:
        try:
            index = index_tar(path)
        except OSError as error:
            raise ValueError(f"cannot read the shard {path!r}: {error.strerror}") from None
        samples: dict[str, dict[str, Member]] = {}
        for member in index.members:
            folder, _, file_name = member.name.rpartition("/")
            stem, _, ending = file_name.partition(".")
            key = f"{folder}/{stem}" if folder else stem
            samples.setdefault(key, {})[ending.lower()] = member
        if not samples:
            found = ", ".join(f"{reason}: {count}" for reason, count in sorted(index.rejected.items()))
            raise ValueError(f"the shard {path!r} holds no usable sample ({found or 'it is empty'})")
        for reason, count in index.rejected.items():
            self.rejected[reason] = self.rejected.get(reason, 0) + count
        if index.damage:
            self.damage[path] = index.damage
        self.keys += samples
        self._samples += [(number, members) for members in samples.values()]

    def endings(self, sample: int) -> list[str]:
        """What members the sample has: "png", "txt", "codes.json"."""
        return list(self._samples[sample][1])

    def path(self, sample: int) -> str:
        """The shard that holds the sample."""
        return self.paths[self._samples[sample][0]]

    def read(self, sample: int, endings: Sequence[str]) -> dict[str, bytes]:
        """Bytes of those of the named members that the sample has.

        Raises BadSample: text_too_large (a .txt or .json above 1 MiB), read_error.
        """
        shard, members = self._samples[sample]
        contents = {}
        try:
            with open(self.paths[shard], "rb", buffering=0) as file:
                for ending in endings:
                    if ending in members:
                        contents[ending] = self._read(file.fileno(), self.keys[sample], ending, members[ending])
        except OSError as error:
            raise BadSample("read_error", f"{self.paths[shard]}: {error.strerror}") from None
        return contents

    def _read(self, descriptor: int, key: str, ending: str, member: Member) -> bytes:
        if ending.endswith(_TEXT_ENDINGS) and member.size > MAX_TEXT_BYTES:
            raise BadSample(
                "text_too_large", f"{key}.{ending} has {member.size:,} bytes; the limit is {MAX_TEXT_BYTES:,}"
            )
        data = os.pread(descriptor, member.size, member.offset)
        if len(data) < member.size:
            raise BadSample("read_error", f"{key}.{ending}: the shard has become shorter while it was being read")
        return data
