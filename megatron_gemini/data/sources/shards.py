"""WebDataset-style shards: tars in which members that share a key are one sample, readable in any order."""

from __future__ import annotations

import contextlib
import os
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from megatron_gemini.data.sources.files import NumberedFiles
from megatron_gemini.data.sources.index_cache import (
    WORTH_KEEPING,
    Summary,
    read_members,
    read_summary,
    sample_key,
    write_index,
)
from megatron_gemini.data.sources.recognize import recognize
from megatron_gemini.data.sources.storage import MISTAKES, patiently
from megatron_gemini.data.sources.tar_index import Member, index_tar
from megatron_gemini.modalities.bad_sample import BadSample

MAX_TEXT_BYTES = 1024 * 1024  # a caption of 50 MB would be tokenized before anybody sees that no row holds it
TEXT_ENDINGS = ("txt", "json")
MAX_OPEN_MEMBERS = 1_000_000  # whose names and places are kept in memory: about 100 MB


class Shards(NumberedFiles):
    """The samples of a list of shards, numbered through, each with random access.

    Listing reads the summaries of `index_cache`, beside the shards or in `cache`; where there is none, the headers of
    the tar, and a large tar's index is then kept in `cache`. What a shard holds is looked up when a sample of it is
    asked for, and kept for the shards used last.

    A sample's members are named by what follows the first dot of their file names. rejected: members that were left
    out, by reason. damage: shards that break off, by path.
    Raises ValueError naming the shard when one cannot be opened or holds no usable member.
    """

    def __init__(self, paths: Sequence[str], cache: Path | None = None) -> None:
        self.cache = cache
        self._open: OrderedDict[int, ShardContents] = OrderedDict()  # the one used last at the end
        self._summaries = [self._list(number, path) for number, path in enumerate(paths)]
        super().__init__(paths, [summary.samples for summary in self._summaries])
        for path, summary in zip(paths, self._summaries, strict=True):
            self.rejected.update(summary.rejected)
            if summary.damage:
                self.damage[path] = summary.damage

    def _list(self, number: int, path: str) -> Summary:
        try:
            summary = patiently(
                lambda: read_summary(path, self.cache) or self._index(number, path), path, mistakes=MISTAKES
            )
        except OSError as error:
            raise ValueError(f"cannot read the shard {path!r}: {error.strerror}") from None
        if not summary.samples:
            found = ", ".join(f"{reason}: {count}" for reason, count in sorted(summary.rejected.items()))
            other = recognize(path)
            what = f"; it is {other}" if other else ""
            raise ValueError(f"the shard {path!r} holds no usable sample ({found or 'it is empty'}){what}")
        return summary

    def _index(self, number: int, path: str) -> Summary:
        """Read the headers of a tar. Raises OSError if it cannot be read."""
        index = index_tar(path)
        contents = self._keep(number, ShardContents(index.members))
        # Not beside the shard, whose folder may be shared or read-only.
        if self.cache is not None and len(index.members) >= WORTH_KEEPING:
            with contextlib.suppress(OSError):  # a full or read-only disk costs time, nothing else
                write_index(path, self.cache, index)
        return Summary(len(contents.keys), os.path.getsize(path), 0, "", dict(index.rejected), index.damage)

    def _contents(self, shard: int) -> ShardContents:
        """What the shard holds. Raises BadSample: shard_changed; DataUnreachable."""
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        path, summary = self.paths[shard], self._summaries[shard]
        members = read_members(path, summary, self.cache) or patiently(partial(index_tar, path), path).members
        contents = ShardContents(members)
        if len(contents.keys) != summary.samples:
            raise BadSample("shard_changed", f"{path} had {summary.samples} samples and has {len(contents.keys)} now")
        return self._keep(shard, contents)

    def _keep(self, shard: int, contents: ShardContents) -> ShardContents:
        self._open[shard] = contents
        # Counted by members, as a shard may hold ten samples or a million.
        while len(self._open) > 1 and sum(map(len, self._open.values())) > MAX_OPEN_MEMBERS:
            self._open.popitem(last=False)
        return contents

    def key(self, sample: int) -> str:
        """`folder/name` of a sample, up to the first dot of its file name.

        Raises BadSample: shard_changed; DataUnreachable.
        """
        shard, place = self._find(sample)
        return self._contents(shard).keys[place]

    def endings(self, sample: int) -> list[str]:
        """What members the sample has: "png", "txt", "codes.json"."""
        shard, place = self._find(sample)
        return list(self._contents(shard).members(place))

    def read(self, sample: int, endings: Sequence[str]) -> dict[str, bytes]:
        """Bytes of those of the named members that the sample has.

        Raises BadSample: text_too_large (a .txt or .json above 1 MiB), shard_changed; DataUnreachable.
        """
        shard, place = self._find(sample)
        contents = self._contents(shard)
        members, key = contents.members(place), contents.keys[place]

        def read() -> dict[str, bytes]:
            # Opened for every sample: ten thousand shards are more than a process may have open. Not buffered, since a
            # buffer would read beyond the member.
            with open(self.paths[shard], "rb", buffering=0) as file:
                wanted = [ending for ending in endings if ending in members]
                return {ending: self._read(file.fileno(), key, ending, *members[ending]) for ending in wanted}

        return patiently(read, self.paths[shard])

    def _read(self, descriptor: int, key: str, ending: str, offset: int, size: int) -> bytes:
        check_size(key, ending, size)
        data = os.pread(descriptor, size, offset)  # leaves no position behind that another thread could move
        if len(data) < size:
            raise BadSample("shard_changed", f"{key}.{ending}: the shard has become shorter while it was being read")
        return data


def check_size(key: str, ending: str, size: int) -> None:
    """Raise BadSample, text_too_large, for a .txt or .json above 1 MiB."""
    if ending.endswith(TEXT_ENDINGS) and size > MAX_TEXT_BYTES:
        raise BadSample("text_too_large", f"{key}.{ending} has {size:,} bytes; the limit is {MAX_TEXT_BYTES:,}")


class ShardContents:
    """The members of one shard by sample, in columns: a few dozen bytes a member."""

    def __init__(self, members: Sequence[Member]) -> None:
        samples: dict[str, list[int]] = {}
        endings: dict[str, int] = {}
        numbers = np.empty(len(members), np.int32)
        for place, member in enumerate(members):
            key, ending = sample_key(member.name)
            samples.setdefault(key, []).append(place)
            numbers[place] = endings.setdefault(ending, len(endings))
        # Members of a sample need not lie together; its place is that of its first.
        order = np.array([place for places in samples.values() for place in places], np.int64)
        self.keys, self._endings = list(samples), list(endings)
        self._first = np.cumsum([0, *map(len, samples.values())])
        self._ending = numbers[order]
        self._offset = np.array([member.offset for member in members], np.int64)[order]
        self._size = np.array([member.size for member in members], np.int64)[order]

    def __len__(self) -> int:
        return len(self._ending)

    def members(self, place: int) -> dict[str, tuple[int, int]]:
        """(offset, size) of every member of a sample by its ending; of two equal ones, the last."""
        of = slice(int(self._first[place]), int(self._first[place + 1]))
        columns = (self._ending[of].tolist(), self._offset[of].tolist(), self._size[of].tolist())
        return {self._endings[ending]: (offset, size) for ending, offset, size in zip(*columns, strict=True)}
