"""Which elements of a stored piece are those of a wanted one, whatever the layouts of both.

A piece is a range of a flattened shard. In the flattened global tensor it is a row of segments. There is one of them
where the shard is cut along its first dimension, or not at all. Otherwise there is one for every index before.
"""

from __future__ import annotations

import math

import numpy as np

from megatron_gemini.checkpoint.piece import Piece

# A column of an int64 array [segments, 3].
GLOBAL, LOCAL, LENGTH = 0, 1, 2


def segments(piece: Piece) -> np.ndarray:
    """int64 [S, 3], ascending: where a segment begins in the global tensor and in the piece, and its length.

    Rows that pad the vocabulary are in no global tensor, and so in no segment.
    """
    dim = piece.sharded_dim
    if dim is None:
        return np.array([[piece.start, 0, piece.count]], np.int64)[: int(piece.count > 0)]
    before = math.prod(piece.global_shape[:dim])
    after = math.prod(piece.global_shape[dim + 1 :])
    kept = max(0, min(piece.shard_shape[dim], piece.global_shape[dim] - piece.shard_start)) * after
    row, whole = piece.shard_shape[dim] * after, piece.global_shape[dim] * after
    # Only the rows of the shard that the piece reaches into.
    first, last = piece.start // max(row, 1), -(-(piece.start + piece.count) // max(row, 1))
    index = np.arange(first, min(last, before), dtype=np.int64)
    begin = np.maximum(index * row, piece.start)
    end = np.minimum(index * row + kept, piece.start + piece.count)
    place = index * whole + piece.shard_start * after + begin - index * row
    return np.stack([place, begin - piece.start, end - begin], axis=1)[end > begin]


def overlaps(wanted: np.ndarray, stored: np.ndarray) -> np.ndarray:
    """int64 [N, 3]: (element of the wanted piece, element of the stored one, how many) of all that both have.

    wanted, stored: `segments`.
    """
    if not len(wanted) or not len(stored):
        return np.empty((0, 3), np.int64)
    ends = stored[:, GLOBAL] + stored[:, LENGTH]
    first = np.searchsorted(ends, wanted[:, GLOBAL], side="right")
    last = np.searchsorted(stored[:, GLOBAL], wanted[:, GLOBAL] + wanted[:, LENGTH], side="left")
    count = np.maximum(last - first, 0)
    ours = np.repeat(np.arange(len(wanted)), count)
    # 0, 1, ... within each of `ours`, from its first stored segment on.
    theirs = np.arange(count.sum()) - np.repeat(count.cumsum() - count, count) + np.repeat(first, count)
    w, s = wanted[ours], stored[theirs]
    begin = np.maximum(w[:, GLOBAL], s[:, GLOBAL])
    end = np.minimum(w[:, GLOBAL] + w[:, LENGTH], s[:, GLOBAL] + s[:, LENGTH])
    return np.stack([w[:, LOCAL] + begin - w[:, GLOBAL], s[:, LOCAL] + begin - s[:, GLOBAL], end - begin], axis=1)
