"""Pretraining: next-token loss over text and codes on packed multimodal rows."""

from __future__ import annotations

from megatron_gemini.models.stage import StageLoss
from megatron_gemini.objectives.packed import PackedObjective
from megatron_gemini.objectives.pretrain.spec import PretrainConfig


class Pretraining(PackedObjective):
    """The decoder, its encoders and connectors, trained jointly."""

    def stage_loss(self) -> StageLoss:
        section = self.config.objective
        assert isinstance(section, PretrainConfig)
        return self.next_token_loss(section.z_loss)
