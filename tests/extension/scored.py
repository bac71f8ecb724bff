"""A toy objective with columns of its own: each document has a score, each target an emphasis, and both weigh its
loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_gemini.config.objective import ObjectiveConfig
from megatron_gemini.contracts import Column, RowFormat
from megatron_gemini.objectives.spec import ObjectiveSpec

if TYPE_CHECKING:
    import torch

    from megatron_gemini.config.run import RunConfig
    from megatron_gemini.objectives.base import Objective
    from megatron_gemini.parallel.topology import Topology

COLUMNS = (Column("score", per="document", fill=1.0), Column("emphasis", per="target", fill=1.0))


@dataclass(frozen=True)
class ScoredConfig(ObjectiveConfig):
    """The weight of a target is its document's score to the power of `sharpness`, times its emphasis."""

    kind: str = "scored"
    sharpness: float = 1.0


def build(config: RunConfig, topology: Topology, device: torch.device) -> Objective:
    from tests.extension.scored_training import ScoredTraining

    return ScoredTraining(config, topology, device)


SCORED = ObjectiveSpec(
    name="scored",
    section=ScoredConfig,
    rows=lambda section: RowFormat(columns=COLUMNS),
    per_step=lambda config: ("train.rows_per_step", config.train.rows_per_step),
    build=build,
)
