"""Two roles beside the policy, divided as it is: a critic that is trained, on losses that a frozen reference weighs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from megatron_gemini.config.run import RunConfig
from megatron_gemini.engine.multimodal import MultimodalEngine
from megatron_gemini.engine.roles import RoleSpec
from megatron_gemini.models.heads import NextTokenLoss
from megatron_gemini.models.stage import DecoderStage, LossOutput, StageInput, parts
from megatron_gemini.parallel.tensor.layers import LayerFactory
from megatron_gemini.parallel.tensor.vocabulary import Vocabulary
from tests.distributed.rows import LAYOUT, loss_of

CRITIC, REFERENCE = "critic", "reference"
LR_SCALE = 0.5
"""The critic's learning rate over the policy's."""


@dataclass(frozen=True)
class WeighedLoss:
    """The next token's loss of a row, times what the reference gave for the row."""

    plain: NextTokenLoss

    def __call__(self, head: Vocabulary, h_CD: torch.Tensor, row: StageInput) -> LossOutput:
        output = self.plain(head, h_CD, row)
        return output._replace(loss=output.loss * row.batch.columns[REFERENCE])


def weigh(rows: Sequence[StageInput], given: Sequence[LossOutput]) -> None:
    """Put what the reference gave for each row where the critic's loss looks for it."""
    for row, output in zip(rows, given, strict=True):
        row.batch.columns[REFERENCE] = output.loss.detach() / 50


def add_roles(engine: MultimodalEngine, config: RunConfig) -> None:
    """The reference at ZeRO-3 and the critic at ZeRO-2, whatever the policy's stage."""
    split = parts(config, LAYOUT, engine.topology.pipeline_size * engine.topology.virtual_stages)

    def stage(number: int, loss: NextTokenLoss | WeighedLoss) -> DecoderStage:
        return DecoderStage(config, LAYOUT, LayerFactory(engine.topology), split[number], loss)

    plain = loss_of(config)
    engine.add_role(RoleSpec(REFERENCE, lambda number: stage(number, plain), zero_stage=3))
    critic = RoleSpec(
        CRITIC, lambda number: stage(number, WeighedLoss(plain)), trained=True, zero_stage=2, lr_scale=LR_SCALE
    )
    engine.add_role(critic)


def train_roles(engine: MultimodalEngine, weight: float, collect: Callable[[LossOutput], None]) -> None:
    """Let the next step train the critic too. weight: the step's; collect: called with the critic's outputs."""

    def prepare(rows: list[StageInput]) -> None:
        given = engine.roles[REFERENCE].forward(rows)
        if given:  # on the ranks of the last stage, whose losses alone ask for it
            weigh(rows, given)
        engine.roles[CRITIC].forward_backward(rows, engine.topology.shard_size / weight, collect)

    engine.prepare = prepare
