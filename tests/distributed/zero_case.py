"""The configuration whose state `zero_bytes` counts, also for the test that reads the result."""

from __future__ import annotations

import dataclasses
from typing import Any

from megatron_gemini.config.engine import EngineConfig
from megatron_gemini.config.model import ModelConfig
from megatron_gemini.config.run import RunConfig
from tests.distributed.rows import CONFIG

MODEL = ModelConfig(width=192, layers=6, heads=4, kv_heads=1, head_width=48, mlp_width=384)


def case(engine: dict[str, Any]) -> RunConfig:
    """A decoder without encoders, large enough that a row's tensors do not count; engine: fields of its section."""
    return dataclasses.replace(
        CONFIG,
        model=MODEL,
        encoders={name: dataclasses.replace(section, enabled=False) for name, section in CONFIG.encoders.items()},
        engine=EngineConfig(**{"offload_optimizer": "none", "adam": "torch", **engine}),
    )
