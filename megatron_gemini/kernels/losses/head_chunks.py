"""The products of head and loss, a chunk of tokens at a time: logits, the hidden states' gradient, the weight's.

Shape suffixes: T tokens, D model width, V vocabulary rows of this rank that are not padding, C tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from megatron_gemini.kernels.losses.dispatch import choose_backend
from megatron_gemini.kernels.losses.softmax_chunk import KeptExponentials, Labels, Normalizer, Statistics

# Bytes of a chunk's logits. A larger chunk adds to the weight's gradient less often, a smaller one takes less memory:
# at V=65,536 on a CPU, 64 MiB are 256 tokens, where the loss is faster than torch's in a tenth of its memory. On a GPU
# these additions take about 280 / C of the products' time (H100: 3.3 TB/s, 700 TFLOP/s), so its chunks are larger;
# that choice is a calculation and not yet a measurement.
CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 1 << 30}
# Rows of the weight's gradient that are added at once where a chunk's share needs another dtype: the share of a whole
# vocabulary in the low precision would be memory of the weight's size.
_BLOCK = 8192


class VocabularyRows(NamedTuple):
    """Which rows of the vocabulary a rank holds, and what is done with them: arguments of `linear_cross_entropy`."""

    first: int
    size: int
    group: ProcessGroup | None
    reduce_input_gradient: bool
    backend: str | None


def join(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """The chunks' [C] of a list -> [T]."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def check_head(
    h: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, first: int, size: int, group: ProcessGroup | None
) -> None:
    """Raises ValueError, with both values, for what does not fit together."""
    if h.dim() != 2 or weight.dim() != 2 or h.shape[1] != weight.shape[1]:
        raise ValueError(
            f"h_TD {tuple(h.shape)} and weight_VD {tuple(weight.shape)} must be matrices of one width D; flatten h_TD "
            "to [tokens, D]"
        )
    if h.dtype != weight.dtype or not h.is_floating_point():
        raise ValueError(f"h_TD is {h.dtype} and weight_VD {weight.dtype}; give both in one floating-point dtype")
    if target.dtype != torch.int64 or target.shape != h.shape[:1]:
        raise ValueError(
            f"target_T is {target.dtype} {tuple(target.shape)}; h_TD {tuple(h.shape)} needs one int64 id a row"
        )
    if not h.device == weight.device == target.device:
        raise ValueError(
            f"h_TD is on {h.device}, weight_VD on {weight.device} and target_T on {target.device}; they must be on one"
        )
    if first < 0 or size < 1 or (group is None and (first or weight.shape[0] < size)):
        raise ValueError(
            f"first={first} and size={size} with {weight.shape[0]} rows and no group: one rank has all ids "
            "from 0, several need their group"
        )


def _labels(
    target: torch.Tensor, first: int, columns: int, size: int, group: ProcessGroup | None
) -> tuple[Labels, torch.Tensor | None]:
    """(where this rank has the targets, which tokens count; None if all do)."""
    counted = None
    if target.device.type != "cpu":  # looking at the values would wait for the device
        counted = target >= 0
    elif target.shape[0]:
        low, high = (int(x) for x in target.aminmax())
        if high >= size:
            raise ValueError(f"target_T holds id {high}, the vocabulary has {size} ids; correct the data or the size")
        counted = target >= 0 if low < 0 else None
    if counted is None and group is None:  # the usual row of one rank: no mask is made or applied
        return Labels(target, None), None
    column = target - first
    held = (column >= 0) & (column < columns)
    if counted is not None:
        held &= counted
    return Labels(torch.where(held, column, 0), held), counted


class HeadChunks:
    """One call's tokens, cut into chunks (`rows`), and this rank's share of the vocabulary."""

    def __init__(
        self,
        h: torch.Tensor,
        weight: torch.Tensor,
        target: torch.Tensor,
        place: VocabularyRows,
    ) -> None:
        first, size, group, _, backend = place
        self.h, self.weight, self.place, self.group = h, weight, place, group
        length = h.shape[0]  # len() of a tensor takes microseconds
        self.backend = choose_backend(h.device, h.dtype, backend)
        self.dtype = torch.float64 if h.dtype == torch.float64 else torch.float32
        # Padding is not computed at all. A rank of padding only keeps one column, which no token can choose.
        self.padding_only = size <= first
        self.columns = 1 if self.padding_only else min(weight.shape[0], size - first)
        self.matrix = weight if self.columns == weight.shape[0] else weight[: self.columns]
        self.labels, self.counted = _labels(target, first, self.columns, size, group)
        # Ranks exchange something in every chunk: its length must not depend on how many of a rank's rows are padding.
        # With 10 ids on 4 ranks the last one took three times as many tokens a chunk, and gloo aborted (docs/log.md).
        share = size if group is None else -(-size // group.size())
        itemsize = h.itemsize if h.itemsize >= 4 or self.backend.name == "triton" else h.itemsize + 4
        tokens = max(1, CHUNK_BYTES.get(h.device.type, CHUNK_BYTES["cuda"]) // (share * itemsize))
        self.rows = [slice(i, min(i + tokens, length)) for i in range(0, max(1, length), tokens)]
        self.buffer = None if len(self.rows) == 1 else h.new_empty(tokens, self.columns)

    def without_padding(self, x_T: torch.Tensor) -> torch.Tensor:
        """x with 0 at the tokens that do not count."""
        return x_T if self.counted is None else torch.where(self.counted, x_T, 0)

    def logits(self, rows: slice) -> torch.Tensor:
        """[C, V], in memory that the next chunk's take over."""
        if self.buffer is None:
            logits = torch.mm(self.h, self.matrix.t())
        else:
            part = self.h[rows]
            logits = torch.mm(part, self.matrix.t(), out=self.buffer[: part.shape[0]])
        # Not -inf: a largest logit of -inf subtracted from itself would be NaN.
        return logits.fill_(torch.finfo(logits.dtype).min) if self.padding_only else logits

    def statistics(self, rows: slice, logits: torch.Tensor) -> Statistics:
        """Of a chunk's logits over the whole vocabulary, whatever the number of ranks; changes the logits."""
        normalizer, target, kept = self.backend.statistics(logits, self._labels(rows))
        if self.group is not None:
            normalizer, target = _of_all_ranks(normalizer, target, self.group)
        return normalizer, target, kept

    def gradient(
        self,
        rows: slice,
        logits: torch.Tensor,
        kept: KeptExponentials | None,
        normalizer: Normalizer,
        of_softmax: torch.Tensor,
        of_target: torch.Tensor,
    ) -> torch.Tensor:
        """See `softmax_chunk.LossBackend.gradient`."""
        return self.backend.gradient(logits, kept, normalizer, of_softmax, of_target, self._labels(rows))

    def _labels(self, rows: slice) -> Labels:
        return self.labels if self.buffer is None else self.labels.chunk(rows)


def _of_all_ranks(
    normalizer: Normalizer, target_C: torch.Tensor, group: ProcessGroup
) -> tuple[Normalizer, torch.Tensor]:
    """Every rank computes the same from the same numbers, so the ranks agree to the bit."""
    mine = torch.stack((*normalizer, target_C))
    everyone = mine.new_empty(group.size(), *mine.shape)
    dist.all_gather(list(everyone.unbind()), mine, group=group)
    largest_RC, sum_RC, target_RC = everyone.unbind(1)
    largest_C = largest_RC.amax(0)
    return Normalizer(largest_C, (sum_RC * (largest_RC - largest_C).exp()).sum(0)), target_RC.amax(0)


class GradientSums:
    """The gradients of hidden states and weight, added up over the chunks.

    h's is summed over the ranks, if it is to be, while the weight's is being computed. A low-precision weight's
    gradient is added up in float32 and rounded once.
    """

    def __init__(self, chunks: HeadChunks, needs: Sequence[bool]) -> None:
        h, weight = chunks.h, chunks.weight
        self.chunks = chunks
        self.group = chunks.group if chunks.place.reduce_input_gradient else None
        self.h_grad = h.new_empty(h.shape) if needs[0] else None
        self.weight_grad = weight.new_empty(weight.shape) if needs[1] else None
        self.total: torch.Tensor | None = None
        self.pending: list[dist.Work] = []

    def add(self, rows: slice, grad: torch.Tensor) -> None:
        """grad: the gradient of the logits [C, V] of the tokens `rows`."""
        if self.h_grad is not None:
            h_grad = self.h_grad[rows]
            torch.mm(grad, self.chunks.matrix, out=h_grad)
            # Summed chunk by chunk, each while the next product runs, and not all at the end.
            if self.group is not None:
                self.pending.append(dist.all_reduce(h_grad, group=self.group, async_op=True))
        if self.weight_grad is None:
            return
        h = self.chunks.h[rows]
        if self.total is None:
            self.total = self.weight_grad[: self.chunks.columns]
            if self.chunks.buffer is None or h.itemsize >= 4:
                torch.mm(grad.t(), h, out=self.total)
                return
            # Added up in bfloat16, a chunk's share of less than 1/512 of the sum would vanish.
            self.total = torch.zeros(self.total.shape, dtype=torch.float32, device=h.device)
        if self.total.dtype == h.dtype:
            self.total.addmm_(grad.t(), h)
            return
        for total, part in zip(self.total.split(_BLOCK), grad.split(_BLOCK, 1), strict=True):
            total += torch.mm(part.t(), h)

    def finish(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """(h's gradient, the weight's), those that are needed."""
        if self.weight_grad is not None and self.total is not None:
            columns = self.chunks.columns
            if self.total.dtype != self.weight_grad.dtype:
                self.weight_grad[:columns] = self.total
            if columns < self.weight_grad.shape[0]:
                self.weight_grad[columns:] = 0
        for work in self.pending:
            work.wait()
        return self.h_grad, self.weight_grad
