"""The whole of one run's configuration. `layout` has the rules between its sections and the ranks of a job."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_gemini.config.data import DataConfig
from megatron_gemini.config.engine import EncoderEnginesConfig, EngineConfig, ParallelConfig
from megatron_gemini.config.model import AudioConfig, ImageTokenizerConfig, ModelConfig, VisionConfig
from megatron_gemini.config.training import (
    LoggingConfig,
    LossConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainConfig,
)


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides a run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    vision: VisionConfig = field(default_factory=VisionConfig)
    audio: AudioConfig = field(default_factory=AudioConfig)
    image_tokenizer: ImageTokenizerConfig = field(default_factory=ImageTokenizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    encoder_engines: EncoderEnginesConfig = field(default_factory=EncoderEnginesConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
