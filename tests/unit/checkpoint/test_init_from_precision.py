"""Weights that an engine in bf16 begins with: its masters have every bit of them, and its forward the rounded ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_gemini.checkpoint.init_from import initialize
from megatron_gemini.checkpoint.weights import WEIGHTS
from megatron_gemini.config.init_from import InitFromConfig
from megatron_gemini.config.run import RunConfig
from megatron_gemini.engine.deepspeed_config import deepspeed_config
from megatron_gemini.engine.engine import Engine
from megatron_gemini.engine.frozen import FrozenEngine
from megatron_gemini.engine.groups import EngineGroups
from megatron_gemini.engine.zero import ZeroEngine
from megatron_gemini.parallel.topology import Topology
from tests.distributed.rows import CONFIG
from tests.unit.engine.tiny_engines import Tiny, alone_in_the_world

SETTINGS = {
    "stage 0": {"zero_stage": 0},
    "stage 1": {"zero_stage": 1},
    "stage 2": {"zero_stage": 2},
    "stage 2, offloaded": {"zero_stage": 2, "offload_optimizer": "cpu"},
    "stage 3": {"zero_stage": 3},
    "stage 3, offloaded": {"zero_stage": 3, "offload_optimizer": "cpu", "offload_parameters": "cpu"},
}


@pytest.fixture(scope="module", autouse=True)
def world() -> Iterator[None]:
    with alone_in_the_world():
        yield


class OneEngine(Engine):
    """A tiny module in bf16, trained or frozen."""

    def __init__(self, config: RunConfig, trained: bool) -> None:
        super().__init__(config, Topology.serial(), torch.device("cpu"))
        arguments = (Tiny, config, EngineGroups(), deepspeed_config(config, 1, 1), self.device)
        self.whole = ZeroEngine(*arguments) if trained else FrozenEngine(*arguments)
        (self.parts if trained else self.frozen).append(self.whole)  # type: ignore[arg-type]

    def forward_backward(self, step: torch.Tensor, weight: float, collect: Callable[[None], None]) -> None:
        raise AssertionError("it stands still")

    def evaluate(self, step: None, collect: Callable[[None], None]) -> None:
        raise AssertionError("it stands still")


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("kind", SETTINGS)
def test_masters_have_every_bit_and_the_forward_reads_them_rounded(kind: str, trained: bool, tmp_path: Path) -> None:
    plain = Tiny()
    random = torch.Generator().manual_seed(5)
    for parameter in plain.parameters():
        parameter.data = torch.randn(parameter.shape, generator=random) / 3
    values = {name: parameter.detach().clone() for name, parameter in plain.named_parameters()}
    save_file(values, tmp_path / WEIGHTS)
    settings = dataclasses.replace(CONFIG.engine, precision="bf16", **SETTINGS[kind])
    engine = OneEngine(
        dataclasses.replace(CONFIG, engine=settings, init_from=(InitFromConfig(str(tmp_path)),)), trained
    )
    initialize(engine)
    for fragment in engine.whole.fragments:
        wanted = values[fragment.name] if trained else values[fragment.name].bfloat16()
        assert not torch.equal(values[fragment.name], values[fragment.name].bfloat16().float())
        assert torch.equal(fragment.master()[: fragment.count].cpu(), wanted.flatten()), fragment.name
    x = torch.linspace(-1.0, 1.0, 8).bfloat16()
    with torch.no_grad():
        assert torch.equal(engine.whole.forward(x), plain.bfloat16()(x))
