"""Small jobs for the tests of planning."""

from __future__ import annotations

from megatron_gemini.config.data import DataConfig
from megatron_gemini.config.encoders import AudioConfig, EncoderEnginesConfig, VisionConfig
from megatron_gemini.config.engine import EngineConfig, ParallelConfig
from megatron_gemini.config.model import ModelConfig
from megatron_gemini.config.run import RunConfig
from megatron_gemini.config.training import TrainConfig
from megatron_gemini.planning.hardware import GPUS
from megatron_gemini.planning.job import Job
from megatron_gemini.planning.search import Machine

VOCABULARY = 1000
MODEL = ModelConfig(width=256, layers=8, heads=8, head_width=32, mlp_width=768)


def job(
    world: int = 1,
    *,
    encoders: bool = True,
    rows: int = 16,
    tokens: int = 512,
    engine: dict | None = None,
    encoder_engines: dict | None = None,
    **parallel,
) -> Job:
    """A job of a small model; engine, encoder_engines and the rest are fields of their sections."""
    config = RunConfig(
        model=MODEL,
        encoders={"vision": VisionConfig(enabled=encoders), "audio": AudioConfig(enabled=encoders)},
        data=DataConfig(row_tokens=tokens, lanes=rows),
        parallel=ParallelConfig(**parallel),
        engine=EngineConfig(**{"zero_stage": 1, "offload_optimizer": "none", "precision": "bf16", **(engine or {})}),
        encoder_engines=EncoderEnginesConfig(**(encoder_engines or {})),
        train=TrainConfig(rows_per_step=rows),
    )
    return Job(config, world, VOCABULARY)


def machine(gpu_memory: float = 80e9, host_memory: float = 1e12, gpus_per_node: int = 8) -> Machine:
    return Machine(GPUS["h100"], int(gpu_memory), int(host_memory), gpus_per_node)
