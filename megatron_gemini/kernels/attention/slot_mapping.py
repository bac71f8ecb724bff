"""From the rows of a tensor to the slots of a document-by-document plan, and back.

A slot is one of the places that a plan's calls read, bucket after bucket, then the documents that are cut.
Shape suffixes: T rows of the tensor (all tokens of the packed row, or this rank's queries), S slots.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch


@dataclass(frozen=True)
class SlotMapping:
    """Which row every slot shows.

    size: T, rows of the tensor. covered: rows that have a slot; they come first unless `rows` says where they are.
    gather: int64 [S], row of every slot; None where slot i is row i, which then costs nothing.
    scatter: int64 [covered], slot of every covered row, the inverse of `gather`.
    repeats: the slots that show the row of the slot before them again, to fill up a bucket; None if there is none.
    """

    size: int
    covered: int
    rows: torch.Tensor | None
    gather: torch.Tensor | None
    scatter: torch.Tensor | None
    repeats: torch.Tensor | None


def slots_of(row_S: np.ndarray, size: int, device: torch.device) -> SlotMapping:
    """row_S: int64, the row that every slot shows; a row's slots are adjacent."""
    count = len(row_S)
    first = np.ones(count, bool)
    first[1:] = row_S[1:] != row_S[:-1]
    if not count or (row_S[0] == 0 and row_S[-1] == count - 1 and (np.diff(row_S) == 1).all()):
        return SlotMapping(size, count, None, None, None, None)
    slot_of_row = np.full(size, -1, np.int64)
    slot_of_row[row_S[first]] = np.flatnonzero(first)
    rows = np.flatnonzero(slot_of_row >= 0)
    tensor = partial(torch.as_tensor, device=device)
    return SlotMapping(
        size,
        len(rows),
        None if rows[-1] == len(rows) - 1 else tensor(rows),
        tensor(row_S),
        tensor(slot_of_row[rows]),
        None if first.all() else tensor(np.flatnonzero(~first)),
    )


def to_slots(x_T: torch.Tensor, slots: SlotMapping) -> torch.Tensor:
    """[T, ...] -> [S, ...]."""
    if slots.gather is not None:
        return x_T.index_select(0, slots.gather)
    return x_T if slots.covered == slots.size else x_T[: slots.covered]


def to_rows(x_S: torch.Tensor, slots: SlotMapping, missing: float = 0.0) -> torch.Tensor:
    """[S, ...] -> [T, ...], `missing` in rows without a slot.

    The inverse of `to_slots` and, since a repeat's gradient is zero (no token sees it), its gradient as well.
    """
    if slots.covered == slots.size:
        return x_S if slots.scatter is None else x_S.index_select(0, slots.scatter)
    # Not zeros first and then the values: most of the memory would be written twice.
    out = x_S.new_empty(slots.size, *x_S.shape[1:])
    if slots.rows is not None:
        assert slots.scatter is not None
        return out.fill_(missing).index_copy_(0, slots.rows, x_S.index_select(0, slots.scatter))
    out[slots.covered :] = missing
    if slots.scatter is None:
        out[: slots.covered] = x_S
    else:
        torch.index_select(x_S, 0, slots.scatter, out=out[: slots.covered])
    return out


def without_repeats(x_S: torch.Tensor, slots: SlotMapping) -> torch.Tensor:
    """The gradient of what `to_rows` reads: 0 at repeats. Changes `x_S` in place where there are any."""
    # A repeat's output is never read, but `to_slots` gives it the gradient of the row that it shows: counted twice.
    return x_S if slots.repeats is None else x_S.index_fill_(0, slots.repeats, 0.0)
