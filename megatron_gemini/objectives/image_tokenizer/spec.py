"""Training of the image code tokenizer: images in, the same images out, through a row of discrete codes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_gemini.config.check import positive
from megatron_gemini.config.objective import ObjectiveConfig
from megatron_gemini.objectives.spec import ObjectiveSpec

if TYPE_CHECKING:
    import torch

    from megatron_gemini.config.run import RunConfig
    from megatron_gemini.objectives.base import Objective
    from megatron_gemini.parallel.topology import Topology


@dataclass(frozen=True)
class ImageTokenizerObjectiveConfig(ObjectiveConfig):
    """The loss's own weights are in the section image_tokenizer."""

    kind: str = "image_tokenizer"
    images_per_step: int = 128
    """Global batch, in images."""

    def __post_init__(self) -> None:
        positive(self, "objective", "images_per_step")


def build(config: RunConfig, topology: Topology, device: torch.device) -> Objective:
    # Here: `--help`, configuration and planner read the spec without torch.
    from megatron_gemini.objectives.image_tokenizer.objective import ImageTokenizerTraining

    return ImageTokenizerTraining(config, topology, device)


IMAGE_TOKENIZER = ObjectiveSpec(
    name="image_tokenizer",
    section=ImageTokenizerObjectiveConfig,
    rows=None,
    per_step=lambda config: ("objective.images_per_step", _images(config)),
    build=build,
    data_parallel_only=True,
)


def _images(config: RunConfig) -> int:
    assert isinstance(config.objective, ImageTokenizerObjectiveConfig)
    return config.objective.images_per_step
