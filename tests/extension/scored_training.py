"""The half of the toy objective above the engine. Shape suffixes: T tokens of a row, C tokens of a context rank."""

from __future__ import annotations

import dataclasses

import torch

from megatron_gemini.contracts import Batch, StepRows
from megatron_gemini.models.heads import NextTokenLoss
from megatron_gemini.models.stage import LossOutput, StageInput, StageLoss
from megatron_gemini.objectives.packed import PackedObjective
from megatron_gemini.parallel.tensor.vocabulary import Vocabulary
from tests.extension.scored import ScoredConfig


@dataclasses.dataclass(frozen=True)
class ScoredLoss:
    """The next token's loss with other weights."""

    plain: NextTokenLoss
    sharpness: float

    def __call__(self, head: Vocabulary, h_CD: torch.Tensor, row: StageInput) -> LossOutput:
        weighted = dataclasses.replace(row.batch, weight_T=weights(row.batch, self.sharpness))
        return self.plain(head, h_CD, StageInput(weighted, own_C=row.own_C))


def weights(batch: Batch, sharpness: float) -> torch.Tensor:
    """float32[T]: the weight of every target."""
    score_T = torch.cat([batch.columns["score"].new_zeros(1), batch.columns["score"]])[batch.segment_T.long()]
    return batch.weight_T * score_T**sharpness * batch.columns["emphasis"]


class ScoredTraining(PackedObjective):
    """Trains on documents by their scores."""

    def stage_loss(self) -> StageLoss:
        return ScoredLoss(self.next_token_loss(z_loss=0.0), self.section.sharpness)

    @property
    def section(self) -> ScoredConfig:
        assert isinstance(self.config.objective, ScoredConfig)
        return self.config.objective

    def weight(self, step: StepRows) -> float:
        return sum(float(weights(batch, self.section.sharpness).sum()) for batch in step.rows)
