"""Tars in an object store, read by ranges of the object."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_gemini.data.sources.index_cache import Summary
from megatron_gemini.data.sources.paths import open_binary
from megatron_gemini.data.sources.shards import MAX_TEXT_BYTES, TEXT_ENDINGS, ShardContents, Shards
from megatron_gemini.data.sources.tar_index import index_tar
from megatron_gemini.modalities.bad_sample import BadSample


class RemoteTars(Shards):
    """As `Shards`; listing walks the headers of every tar in the store, which is slow for many of them."""

    def _index(self, number: int, path: str) -> Summary:
        index = index_tar(path)
        contents = self._keep(number, ShardContents(index.members))
        return Summary(len(contents.keys), 0, 0, "", dict(index.rejected), index.damage)

    def read(self, sample: int, endings: Sequence[str]) -> dict[str, bytes]:
        """Bytes of those of the named members that the sample has. Raises BadSample: text_too_large, read_error."""
        shard, place = self._find(sample)
        contents = self._contents(shard)
        members, key, found = contents.members(place), contents.keys[place], {}
        try:
            with open_binary(self.paths[shard]) as file:  # a range of the object for every member, not all of it
                for ending in [ending for ending in endings if ending in members]:
                    offset, size = members[ending]
                    if ending.endswith(TEXT_ENDINGS) and size > MAX_TEXT_BYTES:
                        raise BadSample("text_too_large", f"{key}.{ending} has {size:,} bytes, of {MAX_TEXT_BYTES:,}")
                    file.seek(offset)
                    found[ending] = file.read(size)
                    if len(found[ending]) < size:
                        raise BadSample("read_error", f"{key}.{ending}: the shard has become shorter")
        except OSError as error:
            words = error.strerror or type(error).__name__
            raise BadSample("read_error", f"{self.paths[shard]}: {words}") from None
        return found
