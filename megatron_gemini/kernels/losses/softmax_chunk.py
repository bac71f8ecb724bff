"""What the loss does to one chunk of logits, in place: first the softmax's statistics, then the loss's gradient.

The two are apart because tensor-parallel ranks exchange the statistics in between. Here are what every backend takes
and gives, and torch's backend; Triton's is `softmax_chunk_triton`, and `dispatch` chooses.

Shape suffixes: C tokens of the chunk, V vocabulary rows of this rank that are not padding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch


class Labels(NamedTuple):
    """column_C: int64, where this rank has each target, 0 if it does not. held_C: whether it does; None: always."""

    column_C: torch.Tensor
    held_C: torch.Tensor | None

    def chunk(self, rows: slice) -> Labels:
        return Labels(self.column_C[rows], None if self.held_C is None else self.held_C[rows])


class Normalizer(NamedTuple):
    """Of every token's softmax: its largest logit and the sum of exp(logit - largest), [C], float32 or float64."""

    largest_C: torch.Tensor
    sum_C: torch.Tensor


class KeptExponentials(NamedTuple):
    """exp(logits - largest), [C, V] in the normalizer's dtype, and that largest."""

    exponential_CV: torch.Tensor
    largest_C: torch.Tensor


Statistics = tuple[Normalizer, torch.Tensor, KeptExponentials | None]
"""Of a rank's logits: the normalizer, the targets' logits (-inf where it does not hold them), what is kept of them."""


class LossBackend(NamedTuple):
    """statistics(logits_CV, labels) -> `Statistics`.

    gradient(logits_CV, kept, normalizer, of_softmax_C, of_target_C, labels) -> [C, V] in the logits' dtype and memory:
    of_softmax * softmax - of_target * onehot(target). The normalizer is that of all ranks. kept is what `statistics`
    gave, or None in a recomputation: the logits are then as they were before `statistics`.
    """

    name: str
    statistics: Callable[[torch.Tensor, Labels], Statistics]
    gradient: Callable[
        [torch.Tensor, KeptExponentials | None, Normalizer, torch.Tensor, torch.Tensor, Labels], torch.Tensor
    ]


def _wide(logits_CV: torch.Tensor) -> torch.Tensor:
    return logits_CV if logits_CV.itemsize >= 4 else logits_CV.float()


def _statistics(logits_CV: torch.Tensor, labels: Labels) -> Statistics:
    values = _wide(logits_CV)
    largest_C1 = values.amax(-1, keepdim=True)
    target_C = values.gather(1, labels.column_C.unsqueeze(1)).squeeze(1)
    if labels.held_C is not None:
        target_C = target_C.masked_fill_(~labels.held_C, -torch.inf)
    exponential = values.sub_(largest_C1).exp_()  # float32 logits are overwritten: a chunk exists once
    largest_C = largest_C1.squeeze(1)
    return Normalizer(largest_C, exponential.sum(-1)), target_C, KeptExponentials(exponential, largest_C)


def _gradient(
    logits_CV: torch.Tensor,
    kept: KeptExponentials | None,
    normalizer: Normalizer,
    of_softmax_C: torch.Tensor,
    of_target_C: torch.Tensor,
    labels: Labels,
) -> torch.Tensor:
    factor_C = of_softmax_C / normalizer.sum_C
    if kept is None:
        exponential = _wide(logits_CV).sub_(normalizer.largest_C.unsqueeze(1)).exp_()
    else:
        exponential = kept.exponential_CV
        if kept.largest_C is not normalizer.largest_C:  # another rank may have the largest logit
            factor_C *= (kept.largest_C - normalizer.largest_C).exp_()
    if labels.held_C is not None:
        of_target_C = of_target_C * labels.held_C  # elsewhere the label's column is 0, which is not the target
    exponential.mul_(factor_C.unsqueeze(1)).scatter_add_(1, labels.column_C.unsqueeze(1), -of_target_C.unsqueeze(1))
    return exponential if exponential.dtype == logits_CV.dtype else logits_CV.copy_(exponential)


TORCH = LossBackend("torch", _statistics, _gradient)
