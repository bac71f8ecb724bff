"""An engine of every kind that DeepSpeed makes, over a module of two parameters, in this process alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

import deepspeed.comm.comm
import torch
from deepspeed.utils import groups
from torch import nn

from megatron_gemini.config.run import RunConfig
from megatron_gemini.engine.deepspeed_config import deepspeed_config
from megatron_gemini.engine.distributed import choose_device, join, leave
from megatron_gemini.engine.frozen import FrozenEngine
from megatron_gemini.engine.groups import EngineGroups
from megatron_gemini.engine.zero import ZeroEngine
from megatron_gemini.parallel.parameters import new_parameter, normal
from tests.distributed.rows import CONFIG

KINDS = {
    "plain": {"zero_stage": 0},
    "unfused": {"zero_stage": 0, "precision": "bf16"},
    "bf16": {"zero_stage": 1, "precision": "bf16"},
    "stage 1": {"zero_stage": 1},
    "stage 2, offloaded": {"zero_stage": 2, "offload_optimizer": "cpu"},
    "stage 3": {"zero_stage": 3},
    "stage 3, offloaded": {"zero_stage": 3, "offload_optimizer": "cpu", "offload_parameters": "cpu"},
    "frozen": {"zero_stage": 3},
}


class Tiny(nn.Module):
    """sum(x w + v)^2"""

    def __init__(self) -> None:
        super().__init__()
        self.w = new_parameter(8, 4, init=normal(0.1))
        self.v = new_parameter(4, init=normal(0.1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x @ self.w + self.v).square().sum()


def config_of(kind: str) -> RunConfig:
    return dataclasses.replace(CONFIG, engine=dataclasses.replace(CONFIG.engine, **KINDS[kind]))


def engine_of(kind: str) -> ZeroEngine | FrozenEngine:
    config = config_of(kind)
    make = FrozenEngine if kind == "frozen" else ZeroEngine
    return make(Tiny, config, EngineGroups(), deepspeed_config(config, 1, 1), torch.device("cpu"))


@contextmanager
def alone_in_the_world() -> Iterator[None]:
    """A process group of this process, left at the end."""
    join(choose_device())
    try:
        yield
    finally:
        leave()
        # DeepSpeed keeps the group that is gone, and another file's engines in this process would ask it.
        deepspeed.comm.comm.cdb = None
        groups._WORLD_GROUP = None
