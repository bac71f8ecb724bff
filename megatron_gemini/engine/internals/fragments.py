"""A rank's pieces of all parameters, which ZeRO keeps somewhere else at each stage, seen alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Fragment:
    """This rank's piece of one parameter: elements [start, start + count) of its flattened tensor-parallel shard."""

    name: str
    parameter: nn.Parameter
    shard_shape: tuple[int, ...]
    start: int
    count: int
    master: Callable[[], torch.Tensor]
    """float32[count], a view of the master weights."""
    moment: Callable[[str], torch.Tensor]
    """float32[count], a view of one of Adam's moments; exists after `OptimizerWrapper.ensure_moments`."""
    gradient: Callable[[], torch.Tensor | None]
    """Flat view of the averaged gradient (count elements or more, zeros behind); None where there was none."""
    group: int = 0
    """Views of another group may be void once one of this group has been taken: those on disk come in one at a time."""
