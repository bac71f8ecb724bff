"""A whole model on an engine without DeepSpeed, for tests of what fills engines."""

from collections.abc import Callable

import torch

from megatron_gemini.config.run import RunConfig
from megatron_gemini.contracts import TokenLayout
from megatron_gemini.engine.engine import Engine
from megatron_gemini.engine.frozen import FrozenEngine
from megatron_gemini.engine.groups import EngineGroups
from megatron_gemini.models.gemini import Gemini
from megatron_gemini.parallel.tensor.layers import LayerFactory
from megatron_gemini.parallel.topology import Topology


class StillEngine(Engine):
    """All of a `Gemini`, frozen, with the initial values of `train.seed`."""

    def __init__(self, config: RunConfig, layout: TokenLayout) -> None:
        super().__init__(config, Topology.serial(), torch.device("cpu"))
        self.settings = {"zero_optimization": {"stage": 0}}
        self.frozen = [
            FrozenEngine(
                lambda: Gemini(config, layout, LayerFactory(self.topology)),
                config,
                EngineGroups(),
                self.settings,
                self.device,
            )
        ]

    def weights(self) -> dict[str, torch.Tensor]:
        """By name, as they are now."""
        return {name: parameter.detach().clone() for name, parameter in self.frozen[0].module.named_parameters()}

    def forward_backward(self, step: None, weight: float, collect: Callable[[None], None]) -> None:
        raise AssertionError("it stands still")

    def evaluate(self, step: None, collect: Callable[[None], None]) -> None:
        raise AssertionError("it stands still")
