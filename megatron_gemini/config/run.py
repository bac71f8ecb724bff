"""The whole of one run's configuration. `layout` has the rules between its sections and the ranks of a job."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

from megatron_gemini.config.data import DataConfig
from megatron_gemini.config.encoders import EncoderConfig, EncoderEnginesConfig
from megatron_gemini.config.engine import EngineConfig, ParallelConfig
from megatron_gemini.config.init_from import InitFromConfig
from megatron_gemini.config.model import ImageTokenizerConfig, ModelConfig
from megatron_gemini.config.objective import ObjectiveConfig
from megatron_gemini.config.schema import Chosen, Named
from megatron_gemini.config.training import LoggingConfig, OptimizerConfig, ScheduleConfig, TrainConfig
from megatron_gemini.registry import ENCODERS, OBJECTIVES


def usual_lanes(rows_per_step: int) -> int:
    """How many lanes a run has that asks for no number: a multiple of its rows, so that every rank has as many.

    At least 8, and at most 256 where the rows are not more.
    """
    # By the rows alone, and not by the machine's cores: the same configuration reads the same samples anywhere. Every
    # lane fills its look-ahead before the first row, so 256 of them for the 2 rows of a small machine start slowly.
    return rows_per_step * max(1, min(max(4, 8 // rows_per_step), 256 // rows_per_step))


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides a run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    # Made when asked for: a plugin that is loaded later registers more.
    encoders: Annotated[Mapping[str, EncoderConfig], Named(ENCODERS)] = field(
        default_factory=lambda: {name: ENCODERS.get(name).section() for name in ENCODERS}
    )
    """Settings of every encoder that is registered, by its name."""
    image_tokenizer: ImageTokenizerConfig = field(default_factory=ImageTokenizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    encoder_engines: EncoderEnginesConfig = field(default_factory=EncoderEnginesConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    objective: Annotated[ObjectiveConfig, Chosen(OBJECTIVES)] = field(
        default_factory=lambda: OBJECTIVES.get("pretrain").section()
    )
    train: TrainConfig = field(default_factory=TrainConfig)
    init_from: tuple[InitFromConfig, ...] = ()
    """Weights that a new run begins with; a run that goes on has its own."""
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    def __post_init__(self) -> None:
        if not self.data.lanes:
            data = dataclasses.replace(self.data, lanes=usual_lanes(self.train.rows_per_step))
            object.__setattr__(self, "data", data)

    @property
    def enabled_encoders(self) -> tuple[str, ...]:
        """Names of the encoders of the model, in the order in which every rank runs them."""
        # A section that is not there is of an encoder that is not either: configurations in code may name a few.
        return tuple(name for name, section in self.encoders.items() if section.enabled)
