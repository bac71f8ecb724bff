"""What a training task sees of DeepSpeed: `forward_backward`, `step`, sums over ranks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from megatron_gemini.config.run import RunConfig
from megatron_gemini.engine.deepspeed_config import deepspeed_config
from megatron_gemini.engine.frozen import FrozenEngine
from megatron_gemini.engine.groups import EngineGroups
from megatron_gemini.engine.norm import global_norm
from megatron_gemini.engine.partial_gradients import complete_gradients
from megatron_gemini.engine.zero import ZeroEngine
from megatron_gemini.parallel.topology import Topology


@dataclass(frozen=True)
class StepResult:
    """What a step did. norm: global gradient norm before clipping; skipped: it was not finite."""

    norm: float
    skipped: bool


class Engine(ABC):
    """ZeRO engines that take a step together: one norm, one decision to skip.

    parts: those of this rank. frozen: modules that are not trained, whose weights belong to checkpoints all the same.
    """

    def __init__(self, config: RunConfig, topology: Topology, device: torch.device) -> None:
        self.config, self.topology, self.device = config, topology, device
        self.parts: list[ZeroEngine] = []
        self.frozen: list[FrozenEngine] = []

    @property
    def dtype(self) -> torch.dtype:
        """Of the computation."""
        return self.parts[0].dtype

    @abstractmethod
    def forward_backward(self, step: Any, weight: float, collect: Callable[[Any], None]) -> None:
        """Gradients of sum(loss) / weight over the microbatches of all data-parallel ranks.

        step: what this rank has of a global step. weight: its sum of loss weights, over all ranks. collect: called with
        every output that has a loss, on the ranks that hold it.
        """

    @abstractmethod
    def evaluate(self, step: Any, collect: Callable[[Any], None]) -> None:
        """Forward only, without a graph."""

    @property
    def optimizer_name(self) -> str:
        return self.parts[0].optimizer_name

    def step(self, lr: float) -> StepResult:
        """Clip by the true global norm and update; a non-finite norm skips the update on every rank."""
        for part in self.parts:
            part.wait()
            complete_gradients(part, self.topology, self.device)
        norm = global_norm([piece for part in self.parts for piece in part.owned()], self.device)
        for part in self.parts:
            part.step(lr, norm)
        return StepResult(float(norm), skipped=not bool(torch.isfinite(norm)))

    def total(self, values: Sequence[float]) -> list[float]:
        """Each value summed over all ranks; a rank that has nothing to add gives zeros."""
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        if self.topology.world > 1:
            dist.all_reduce(tensor)
        return tensor.tolist()

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, in their order; small plain Python values."""
        gathered = [value] * self.topology.world
        if self.topology.world > 1:
            dist.all_gather_object(gathered, value)
        return gathered


class WholeModelEngine(Engine):
    """One module, whole on every data-parallel rank, whose forward(batch) returns something with a `.loss` to sum.

    build: makes it, values not yet set. step: microstep of a global step over all ranks.
    """

    def __init__(
        self,
        build: Callable[[], nn.Module],
        config: RunConfig,
        topology: Topology,
        device: torch.device,
        step: int,
    ) -> None:
        super().__init__(config, topology, device)
        settings = deepspeed_config(config, step // topology.data_size, topology.data_size)
        self.whole = ZeroEngine(build, config, EngineGroups.of_decoder(topology), settings, device)
        self.parts = [self.whole]

    def forward_backward(self, step: Sequence[Any], weight: float, collect: Callable[[Any], None]) -> None:
        scale = self.topology.data_size / weight  # DeepSpeed averages over the data-parallel ranks
        for index, batch in enumerate(step):
            output = self.whole.forward(batch)
            self.whole.backward(output.loss * scale, boundary=index == len(step) - 1)
            collect(output)

    def evaluate(self, step: Sequence[Any], collect: Callable[[Any], None]) -> None:
        with self.whole.evaluating():
            for batch in step:
                collect(self.whole.forward(batch))
