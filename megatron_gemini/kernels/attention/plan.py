"""What attention needs to know of a packed row: checked once a microbatch, used by all layers and every backend.

Shape suffixes: T packed tokens of the row; Q queries, all of its tokens or some; M memory embeddings.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property

import torch

from megatron_gemini.kernels.attention.bounds import (
    Bounds,
    Intervals,
    PackedSequences,
    make_bounds,
    read_intervals,
    read_sequences,
)
from megatron_gemini.kernels.attention.cpu.calls import Call, cpu_calls
from megatron_gemini.kernels.attention.documents import DocumentCalls, group_documents
from megatron_gemini.kernels.attention.memory import group_memory, read_memory
from megatron_gemini.kernels.attention.row import RowLayout, read_row
from megatron_gemini.kernels.rope import CosSin, apply_rope, apply_rope_to_both


@dataclass(frozen=True, eq=False)
class AttentionPlan(ABC):
    """Which keys each query sees. Made by `plan_attention` or `plan_cross_attention`; opaque to callers.

    segment_T: the row's documents.
    query_Q: the queries' positions in the row; None if they are all of its tokens.
    keys: rows of k and v. empty: no query sees a key.
    """

    # What a backend derives from these is a cached property: it is made when the first layer asks, and once for all.
    # Equality is identity (eq=False), so that backends may keep what they make of a plan by the plan.
    segment_T: torch.Tensor
    query_Q: torch.Tensor | None
    keys: int
    empty: bool

    @property
    def tokens(self) -> int:
        return len(self.segment_T)

    @property
    def queries(self) -> int:
        return self.tokens if self.query_Q is None else len(self.query_Q)

    @property
    @abstractmethod
    def documents(self) -> DocumentCalls:
        """For the backends that work document by document."""

    @property
    @abstractmethod
    def bounds(self) -> Bounds:
        """For the backends that work tile by tile."""

    @property
    def sequences(self) -> PackedSequences | None:
        """For backends with one mask for all documents; None if the plan is not so."""
        return None

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


@dataclass(frozen=True, eq=False)
class SelfAttentionPlan(AttentionPlan):
    """Keys are the row's tokens."""

    span_T: torch.Tensor
    _row: RowLayout

    @cached_property
    def documents(self) -> DocumentCalls:
        return group_documents(self._row, self.segment_T.device)

    @cached_property
    def bounds(self) -> Bounds:
        return make_bounds(read_intervals(self._row), self.segment_T.device)

    @cached_property
    def sequences(self) -> PackedSequences | None:
        """None if documents differ in their masks, or some of the row's queries are elsewhere."""
        return None if self.query_Q is not None else read_sequences(self._row, self.segment_T.device)


@dataclass(frozen=True, eq=False)
class CrossAttentionPlan(AttentionPlan):
    """Keys are memory embeddings, which have no place among the row's tokens."""

    segment_M: torch.Tensor
    after_M: torch.Tensor
    _intervals: Intervals

    @cached_property
    def documents(self) -> DocumentCalls:
        return group_memory(self._intervals, self.segment_T.device)

    @cached_property
    def bounds(self) -> Bounds:
        return make_bounds(self._intervals, self.segment_T.device)


def plan_attention(
    segment_T: torch.Tensor, span_T: torch.Tensor, query_Q: torch.Tensor | None = None
) -> SelfAttentionPlan:
    """Read a row's documents and spans, once a microbatch.

    segment_T: integer document ids, each one contiguous run; 0 is padding, at the end of the row only.
    span_T: integer, 0 for a causal token, otherwise the id of a bidirectional span (see `contracts.Batch`): one
        contiguous run within one document.
    query_Q: int64, ascending positions in the row of the tokens whose queries this rank has, a few contiguous runs as
        context parallelism gives it; None if it has them all. Keys and values are always the whole row's.
    Raises ValueError for anything else.
    """
    row = read_row(segment_T, span_T, query_Q)
    empty = row.real == 0 or (row.query is not None and not (row.query < row.real).any())
    return SelfAttentionPlan(segment_T, query_Q, len(segment_T), empty, span_T, row)


def plan_cross_attention(
    segment_T: torch.Tensor, segment_M: torch.Tensor, after_M: torch.Tensor, query_Q: torch.Tensor | None = None
) -> CrossAttentionPlan:
    """Read which memory embeddings the tokens of a row see, once a microbatch.

    Token i sees memory j if both are of one document, segment_T[i] = segment_M[j], and after_M[j] <= i. A token that
    sees nothing gets zeros. As documents are contiguous and items follow each other, a token sees one interval.

    segment_T, query_Q: as in `plan_attention`. Keys and values are always all M, whichever queries a rank has.
    segment_M: integer document ids of the row, ascending; 0 is padding, at the end only.
    after_M: int64 [M], the position in the row, 0 to T, from which on a memory embedding is visible, ascending within a
        document. 0 or the document's start: all of the document sees it; the position of its item's placeholder: only
        what follows does.
    Raises ValueError for anything else.
    """
    row = read_row(segment_T, torch.zeros_like(segment_T), query_Q)
    intervals = read_memory(row, segment_M, after_M, segment_T.device)
    start_Q, reach_Q = intervals.query_2Q
    empty = not (reach_Q > start_Q).any()
    return CrossAttentionPlan(segment_T, query_Q, len(segment_M), empty, segment_M, after_M, intervals)
