"""How attention's heads are divided over tensor-parallel ranks."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class HeadShard:
    """This rank's share of the attention heads.

    query: query heads of this rank. key: key/value heads that they read. first: the first of those, among the heads
    whose weights this rank holds. whole: every one of several ranks holds the weights of all key/value heads.
    """

    query: int
    key: int
    first: int = 0
    whole: bool = False

    @staticmethod
    def of(query: int, key: int, ranks: int, rank: int) -> HeadShard:
        """The share that `rank` of `ranks` has of `query` and `key` heads.

        Query heads are divided. Key/value heads are if each rank gets one or more of them. Otherwise every rank holds
        all and reads those of its query heads: dividing them would have keys and values travel in every layer.
        """
        assert query % ranks == 0, f"{query} query heads on {ranks} ranks"
        if key % ranks == 0:
            return HeadShard(query // ranks, key // ranks)
        # Query head n reads key/value head n // (query // key), as on one rank: these are the first and the last.
        first = rank * (query // ranks) // (query // key)
        last = ((rank + 1) * (query // ranks) - 1) // (query // key)
        return HeadShard(query // ranks, last - first + 1, first, whole=True)
