"""Small tables of which every rank has another number of lines, told to all."""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup


def gather_tables(table: np.ndarray, group: ProcessGroup | None, device: torch.device) -> list[np.ndarray]:
    """The float64 tables [lines, columns] of all ranks of `group`, in their order; None: there is no other rank."""
    if group is None or group.size() == 1:
        return [table]
    # The numbers of lines come first, since a gather wants as many of every rank.
    counts = torch.empty(group.size(), dtype=torch.int64, device=device)
    dist.all_gather_into_tensor(counts, torch.tensor([len(table)], device=device), group=group)
    lines = counts.tolist()
    # Every rank sees the same numbers, so that all of them leave here or none does.
    if not max(lines):
        return [table] * len(lines)
    padded = torch.zeros(max(lines), table.shape[1], dtype=torch.float64, device=device)
    padded[: len(table)] = torch.from_numpy(table)
    gathered = padded.new_empty(len(lines) * max(lines), table.shape[1])
    dist.all_gather_into_tensor(gathered, padded, group=group)
    whole = gathered.cpu().numpy().reshape(len(lines), max(lines), -1)
    return [each[:count] for each, count in zip(whole, lines, strict=True)]
