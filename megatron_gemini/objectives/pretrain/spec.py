"""Pretraining: the next token over text and codes, on packed multimodal rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from megatron_gemini.config.check import at_least
from megatron_gemini.config.objective import ObjectiveConfig
from megatron_gemini.config.schema import MAY_CHANGE
from megatron_gemini.contracts import RowFormat
from megatron_gemini.objectives.spec import ObjectiveSpec

if TYPE_CHECKING:
    import torch

    from megatron_gemini.config.run import RunConfig
    from megatron_gemini.objectives.base import Objective
    from megatron_gemini.parallel.topology import Topology


@dataclass(frozen=True)
class PretrainConfig(ObjectiveConfig):
    """Each kind of target has a weight of its own."""

    weights: Mapping[str, float] = field(default_factory=dict, metadata=MAY_CHANGE)
    """Loss weight of each kind of target, such as text and image; 1 for one that is not named."""
    z_loss: float = field(default=1e-4, metadata=MAY_CHANGE)
    """Weight of log^2 of the softmax's normalizer."""

    def __post_init__(self) -> None:
        at_least(self, "objective", 0, "z_loss")
        for name, weight in self.weights.items():
            if not weight >= 0:  # and not `weight < 0`, which nan would pass
                raise ValueError(f"objective.weights.{name} is {weight}; it must be 0 or more")


def build(config: RunConfig, topology: Topology, device: torch.device) -> Objective:
    # Here: `--help`, configuration and planner read the spec without torch.
    from megatron_gemini.objectives.pretrain.objective import Pretraining

    return Pretraining(config, topology, device)


PRETRAIN = ObjectiveSpec(
    name="pretrain",
    section=PretrainConfig,
    rows=lambda section: RowFormat(target_weights=section.weights),
    per_step=lambda config: ("train.rows_per_step", config.train.rows_per_step),
    build=build,
)
