"""Pretraining: next-token loss over text and codes on packed multimodal rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from megatron_gemini.models.stage import StageLoss
from megatron_gemini.objectives.packed import PackedObjective

if TYPE_CHECKING:  # the spec, which is there without torch, imports this file when a run is built
    from megatron_gemini.objectives.pretrain.spec import PretrainConfig


class Pretraining(PackedObjective):
    """The decoder, its encoders and connectors, trained jointly."""

    def stage_loss(self) -> StageLoss:
        return self.next_token_loss(cast("PretrainConfig", self.config.objective).z_loss)
