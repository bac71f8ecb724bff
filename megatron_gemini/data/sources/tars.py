"""Tars in an object store, read by ranges of the object."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from megatron_gemini.data.sources.index_cache import Summary
from megatron_gemini.data.sources.paths import open_binary
from megatron_gemini.data.sources.shards import ShardContents, Shards, check_size
from megatron_gemini.data.sources.storage import MISTAKES, patiently
from megatron_gemini.data.sources.tar_index import index_tar
from megatron_gemini.modalities.bad_sample import BadSample


class RemoteTars(Shards):
    """As `Shards`; listing walks the headers of every tar in the store, which is slow for many of them."""

    def _index(self, number: int, path: str) -> Summary:
        index = patiently(partial(index_tar, path), path, MISTAKES)
        contents = self._keep(number, ShardContents(index.members))
        return Summary(len(contents.keys), 0, 0, "", dict(index.rejected), index.damage)

    def read(self, sample: int, endings: Sequence[str]) -> dict[str, bytes]:
        """Bytes of those of the named members that the sample has. Raises as `Shards.read`."""
        shard, place = self._find(sample)
        contents = self._contents(shard)
        members, key = contents.members(place), contents.keys[place]
        for ending in endings:
            if ending in members:
                check_size(key, ending, members[ending][1])

        def read() -> dict[str, bytes]:
            found = {}
            with open_binary(self.paths[shard]) as file:  # a range of the object for every member, not all of it
                for ending in [ending for ending in endings if ending in members]:
                    offset, size = members[ending]
                    file.seek(offset)
                    found[ending] = file.read(size)
                    if len(found[ending]) < size:
                        raise BadSample("shard_changed", f"{key}.{ending}: the shard has become shorter")
            return found

        return patiently(read, self.paths[shard])
