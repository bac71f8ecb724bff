"""What attention needs to know of a packed row: checked once a microbatch, used by all layers and every backend.

Shape suffixes: T packed tokens of the row, which are the keys; Q queries, all tokens or some of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import torch

from megatron_gemini.kernels.attention.bounds import Bounds, PackedSequences, read_bounds, read_sequences
from megatron_gemini.kernels.attention.cpu.calls import Call, cpu_calls
from megatron_gemini.kernels.attention.documents import DocumentCalls, group_documents
from megatron_gemini.kernels.attention.row import RowLayout, read_row
from megatron_gemini.kernels.rope import CosSin, apply_rope, apply_rope_to_both

Made = TypeVar("Made")


@dataclass(frozen=True)
class AttentionPlan:
    """A row's documents and spans, and which tokens the queries are. Made by `plan_attention`; opaque to callers.

    query_Q: None if the queries are the whole row. What a backend derives from these is made when it first asks.
    """

    segment_T: torch.Tensor
    span_T: torch.Tensor
    query_Q: torch.Tensor | None
    _row: RowLayout
    _made: dict[str, Any] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        return len(self.segment_T)

    @property
    def queries(self) -> int:
        return self.tokens if self.query_Q is None else len(self.query_Q)

    @cached_property
    def empty(self) -> bool:
        """No query sees a key."""
        row = self._row
        return row.real == 0 or (row.query is not None and not (row.query < row.real).any())

    @cached_property
    def documents(self) -> DocumentCalls:
        """For the backends that work document by document."""
        return group_documents(self._row, self.segment_T.device)

    @cached_property
    def bounds(self) -> Bounds:
        """For the backends that work tile by tile."""
        return read_bounds(self._row, self.segment_T.device)

    @cached_property
    def sequences(self) -> PackedSequences | None:
        """For backends with one mask for all documents; None if the row is not so, or some queries are elsewhere."""
        return None if self.query_Q is not None else read_sequences(self._row, self.segment_T.device)

    def remember(self, name: str, make: Callable[[AttentionPlan], Made]) -> Made:
        """What a backend makes of the plan, made once."""
        if name not in self._made:
            self._made[name] = make(self)
        return self._made[name]

    @cached_property
    def cpu_calls(self) -> tuple[Call, ...]:
        return cpu_calls(self.documents)

    def apply_rope(
        self, q_QNH: torch.Tensor, k_TKH: torch.Tensor, cos_sin: CosSin, direction: int = 1
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """RoPE of both by `cos_sin`, which is for the whole row: queries take the rows of their tokens."""
        if self.query_Q is None:
            return apply_rope_to_both(q_QNH, k_TKH, cos_sin, direction)
        own = CosSin(*(x_T1H.index_select(0, self.query_Q) for x_T1H in cos_sin))
        return apply_rope(q_QNH, own, direction), apply_rope(k_TKH, cos_sin, direction)


def plan_attention(segment_T: torch.Tensor, span_T: torch.Tensor, query_Q: torch.Tensor | None = None) -> AttentionPlan:
    """Read a row's documents and spans, once a microbatch.

    segment_T: integer document ids, each one contiguous run; 0 is padding, at the end of the row only.
    span_T: integer, 0 for a causal token, otherwise the id of a bidirectional span (see `contracts.Batch`): one
        contiguous run within one document.
    query_Q: int64, ascending positions in the row of the tokens whose queries this rank has, a few contiguous runs as
        context parallelism gives it; None if it has them all. Keys and values are always the whole row's.
    Raises ValueError for anything else.
    """
    return AttentionPlan(segment_T, span_T, query_Q, read_row(segment_T, span_T, query_Q))
