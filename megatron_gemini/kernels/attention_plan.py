"""What attention needs to know of a packed row: checked once a microbatch, used by all layers and every backend.

Shape suffixes: T packed tokens of the row, which are the keys; Q queries, all tokens or some of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import torch

from megatron_gemini.kernels.attention_bounds import Bounds, Sequences, read_bounds, read_sequences
from megatron_gemini.kernels.attention_cpu_calls import Call, cpu_calls
from megatron_gemini.kernels.attention_documents import DocumentCalls, group_documents
from megatron_gemini.kernels.rope import Rotation, rotate, rotate_both

Made = TypeVar("Made")


@dataclass(frozen=True)
class AttentionPlan:
    """A row's documents and spans, and which tokens the queries are. Made by `plan_attention`; opaque to callers.

    query_Q: None if the queries are the whole row. What a backend derives from these is made when it first asks.
    """

    segment_T: torch.Tensor
    span_T: torch.Tensor
    query_Q: torch.Tensor | None
    _row: tuple[np.ndarray, np.ndarray, np.ndarray | None]  # the three on the CPU
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
        segment, _, query = self._row
        return not (segment if query is None else segment[query]).any()

    @cached_property
    def documents(self) -> DocumentCalls:
        """For the backends that work document by document."""
        return group_documents(*self._row, self.segment_T.device)

    @cached_property
    def bounds(self) -> Bounds:
        """For the backends that work tile by tile."""
        return read_bounds(*self._row, self.segment_T.device)

    @cached_property
    def sequences(self) -> Sequences | None:
        """For backends with one mask for all documents; None if the row is not so, or some queries are elsewhere."""
        return None if self.query_Q is not None else read_sequences(*self._row[:2], self.segment_T.device)

    def remember(self, name: str, make: Callable[[AttentionPlan], Made]) -> Made:
        """What a backend makes of the plan, made once."""
        if name not in self._made:
            self._made[name] = make(self)
        return self._made[name]

    @cached_property
    def cpu_calls(self) -> tuple[Call, ...]:
        return cpu_calls(self.documents)

    def rotate(
        self, q_QNH: torch.Tensor, k_TKH: torch.Tensor, turn: Rotation, direction: int = 1
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """RoPE of both by `turn`, which is for the whole row: queries take the rows of their tokens."""
        if self.query_Q is None:
            return rotate_both(q_QNH, k_TKH, turn, direction)
        own = Rotation(*(x_T1H.index_select(0, self.query_Q) for x_T1H in turn))
        return rotate(q_QNH, own, direction), rotate(k_TKH, turn, direction)


def plan_attention(segment_T: torch.Tensor, span_T: torch.Tensor, query_Q: torch.Tensor | None = None) -> AttentionPlan:
    """Read a row's documents and spans, once a microbatch.

    segment_T: integer document ids, each one contiguous run; 0 is padding, at the end of the row only.
    span_T: integer, 0 for a causal token, otherwise the id of a bidirectional span (see `contracts.Batch`): one
        contiguous run within one document.
    query_Q: int64, ascending positions in the row of the tokens whose queries this rank has, a few contiguous runs as
        context parallelism gives it; None if it has them all. Keys and values are always the whole row's.
    Raises ValueError for anything else.
    """
    _check_metadata(segment_T, span_T, query_Q)
    segment, span = segment_T.cpu().numpy(), span_T.cpu().numpy()
    query = None if query_Q is None else query_Q.cpu().numpy()
    _check_row(segment, span)
    if query is not None:
        _check_queries(query, len(segment))
    return AttentionPlan(segment_T, span_T, query_Q, (segment, span, query))


def _check_metadata(segment_T: torch.Tensor, span_T: torch.Tensor, query_Q: torch.Tensor | None) -> None:
    for name, x in (("segment_T", segment_T), ("span_T", span_T), ("query_Q", query_Q)):
        if x is None:
            continue
        if x.dim() != 1:
            raise ValueError(f"{name} has shape {list(x.shape)}; it is one number a token, of shape [T]")
        if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
            raise ValueError(f"{name} is {x.dtype}; it holds integers, such as torch.int32")
        if x.device != segment_T.device:
            raise ValueError(f"{name} is on {x.device} and segment_T on {segment_T.device}; put them on one device")
    if len(span_T) != len(segment_T):
        raise ValueError(f"span_T has {len(span_T)} tokens and segment_T {len(segment_T)}; both describe one row")


def _check_row(segment: np.ndarray, span: np.ndarray) -> None:
    real = int(np.count_nonzero(segment))
    if not segment[:real].all():
        raise ValueError("segment_T has padding (0) before a document; padding belongs at the end of the row")
    starts = np.flatnonzero(segment[1:] != segment[:-1]) + 1
    _check_runs("segment_T", "document", np.concatenate((segment[:1], segment[starts])), starts)
    crossing = starts[(span[starts] == span[starts - 1]) & (span[starts] != 0)] if span.any() else starts[:0]
    if len(crossing) and segment[crossing[0] - 1]:
        at = crossing[0]
        raise ValueError(
            f"span_T has span {span[at]} on both sides of position {at}, where document {segment[at - 1]} ends and "
            f"{segment[at] or 'the padding'} begins; a span lies within one document"
        )
    starts = np.flatnonzero(span[1:real] != span[: max(real, 1) - 1]) + 1
    _check_runs("span_T", "span", np.concatenate((span[: min(real, 1)], span[starts])), starts)


def _check_runs(name: str, thing: str, ids: np.ndarray, starts: np.ndarray) -> None:
    """ids: of every run of the row, `starts` where the second and later ones begin. 0 may come again, others not."""
    named = ids[ids != 0]
    if len(named) == len(set(named.tolist())):
        return
    seen: set[int] = set()
    for number, start in zip(ids.tolist(), (0, *starts.tolist()), strict=True):
        if number and number in seen:
            raise ValueError(
                f"{name} has {thing} {number} again at position {start}, after another; a {thing} is one contiguous run"
            )
        seen.add(number)


def _check_queries(query: np.ndarray, tokens: int) -> None:
    if len(query) and (query[0] < 0 or query[-1] >= tokens):
        raise ValueError(f"query_Q reaches from {query[0]} to {query[-1]}, but the row has positions 0 to {tokens - 1}")
    if not (query[1:] > query[:-1]).all():
        at = int(np.flatnonzero(query[1:] <= query[:-1])[0])
        raise ValueError(f"query_Q has {query[at + 1]} after {query[at]}; positions ascend, each at most once")
