"""What the last stage makes of its hidden states, for objectives to choose from.

Shape suffixes: C tokens of this context rank, D model width, K kinds of target.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from megatron_gemini.kernels.losses.linear_cross_entropy import linear_cross_entropy
from megatron_gemini.models.stage import LossOutput, StageInput
from megatron_gemini.parallel.tensor.vocabulary import Vocabulary


@dataclass(frozen=True)
class NextTokenLoss:
    """sum(weight * nll) + z_loss * sum(weight * lse^2) over the tokens of a row that have a target with a weight.

    kinds: K, of targets. deferred: keep hidden states and make the logits again in the backward, where many rows wait
    for theirs. Figures: `nll` and `weight`, [K]: sum(weight * nll) and sum(weight) of each kind of target.
    """

    kinds: int
    z_loss: float = 0.0
    deferred: bool = False

    def __call__(self, head: Vocabulary, h_CD: torch.Tensor, row: StageInput) -> LossOutput:
        batch = row.batch
        target, weight, kind = (row.own(x_T) for x_T in (batch.target_T, batch.weight_T, batch.modality_T))
        weighted = weight.nonzero().squeeze(1)
        if len(weighted) < len(weight):  # the head is the largest product of a small model: prompts need none of it
            h_CD, target, weight, kind = (x.index_select(0, weighted) for x in (h_CD, target, weight, kind))
        # The head calls it with its own weight, which ZeRO-3 has gathered inside the forward of the owner only.
        loss_of = functools.partial(
            linear_cross_entropy, target_T=target, weight_T=weight, z_loss=self.z_loss, deferred=self.deferred
        )
        loss, nll = head(h_CD, fused=loss_of)
        sums = torch.zeros(2, self.kinds, dtype=torch.float32, device=weight.device)
        # int32, since index_add_ takes no int8. Sums and not means: microbatches and ranks are added up.
        sums.index_add_(1, kind.int(), torch.stack((weight * nll, weight)))
        return LossOutput(loss, {"nll": sums[0], "weight": sums[1]})
