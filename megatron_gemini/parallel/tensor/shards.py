"""How heads and vocabulary are divided over tensor-parallel ranks, in terms that serial and divided layers share.

Shape suffixes: T packed tokens, N query heads, K key/value heads that they read, H head width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed import ProcessGroup

from megatron_gemini.kernels.attention.api import AttentionPlan

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, AttentionPlan], torch.Tensor]
"""Rotated q_TNH and k_TKH, v_TKH and the row's plan -> [T, N, H]."""

FusedHead = Callable[..., Any]
"""Hidden states [T, D], a vocabulary's weight [V, D], and first, size and group of its `VocabularyShard` by name -> the
operation's result: `linear_cross_entropy` or `token_log_probabilities` with their other arguments bound."""


@dataclass(frozen=True)
class VocabularyShard:
    """Which ids this rank's logits are for: `first` to `first + rows`; those from `size` on are padding."""

    first: int
    rows: int
    size: int
    group: ProcessGroup | None


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
