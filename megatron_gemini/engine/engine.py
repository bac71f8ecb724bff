"""What a training task sees of DeepSpeed: `forward_backward`, `step`, sums over ranks."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import torch
import torch.distributed as dist

from megatron_gemini.config.run import RunConfig
from megatron_gemini.engine.deepspeed_config import deepspeed_config
from megatron_gemini.engine.frozen import FrozenEngine
from megatron_gemini.engine.groups import EngineGroups
from megatron_gemini.engine.module_engine import HasLoss, TypedModule
from megatron_gemini.engine.norm import global_norm
from megatron_gemini.engine.partial_gradients import complete_gradients
from megatron_gemini.engine.roles import Role, RoleSpec
from megatron_gemini.engine.settings import JsonObject
from megatron_gemini.engine.zero import ZeroEngine
from megatron_gemini.parallel.topology import Topology

Step = TypeVar("Step")
Output = TypeVar("Output")
RoleOutput = TypeVar("RoleOutput")
Value = TypeVar("Value")


@dataclasses.dataclass(frozen=True)
class StepResult:
    """What a step did. norm: global gradient norm before clipping; skipped: it was not finite."""

    norm: float
    skipped: bool


class Engine(ABC, Generic[Step, Output]):
    """ZeRO engines that take a step together: one norm, one decision to skip.

    parts: the policy's on this rank. frozen: modules of it that are not trained, whose weights belong to checkpoints
    all the same. roles: other models beside the policy, by name.
    settings: DeepSpeed's dictionary of the policy. between: like what its pipeline stages hand on, if there are any.
    """

    settings: JsonObject
    between: torch.Tensor | None = None

    def __init__(self, config: RunConfig, topology: Topology, device: torch.device) -> None:
        self.config, self.topology, self.device = config, topology, device
        self.parts: list[ZeroEngine] = []
        self.frozen: list[FrozenEngine] = []
        self.roles: dict[str, Role] = {}

    def add_role(self, spec: RoleSpec[RoleOutput]) -> Role[RoleOutput]:
        """Make another model in this job; every rank calls it, before a checkpoint is loaded.

        Raises ValueError for a name that is taken.
        """
        if spec.name in self.roles:
            raise ValueError(f"there is a role {spec.name} already; give this one another name")
        # A role of the policy's width hands on the same as the policy does.
        spec = dataclasses.replace(spec, between=self.between) if spec.between is None else spec
        role = Role(spec, self.config, self.settings, self.topology, self.device)
        self.roles[spec.name] = role
        return role

    @property
    def dtype(self) -> torch.dtype:
        """Of the computation."""
        return self.parts[0].dtype

    @abstractmethod
    def forward_backward(self, step: Step, weight: float, collect: Callable[[Output], None]) -> None:
        """Gradients of sum(loss) / weight over the microbatches of all data-parallel ranks.

        step: what this rank has of a global step. weight: its sum of loss weights, over all ranks. collect: called with
        every output that has a loss, on the ranks that hold it.
        """

    @abstractmethod
    def evaluate(self, step: Step, collect: Callable[[Output], None]) -> None:
        """Forward only, without a graph."""

    @property
    def optimizer_name(self) -> str:
        return self.parts[0].optimizer_name

    def step(self, lr: float) -> StepResult:
        """Clip by the true global norm and update; a non-finite norm skips the update on every rank.

        The norm is that of the policy and of all trained roles.
        """
        rated = [(part, 1.0) for part in self.parts]
        rated += [(part, role.spec.lr_scale) for role in self.roles.values() for part in role.trained]
        # All gradients before the norm, and the norm before any update: each depends on all parts.
        for part, _ in rated:
            part.wait()
            complete_gradients(part, self.topology, self.device)
        norm = global_norm([piece for part, _ in rated for piece in part.owned()], self.device)
        for part, scale in rated:
            part.step(lr * scale, norm)
        return StepResult(float(norm), skipped=not bool(torch.isfinite(norm)))

    def total(self, values: Sequence[float]) -> list[float]:
        """Each value summed over all ranks; a rank that has nothing to add gives zeros."""
        # In float64, which adds up counts of tokens exactly.
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        if self.topology.world > 1:
            dist.all_reduce(tensor)
        return tensor.tolist()

    def gather(self, value: Value) -> list[Value]:
        """The values of all ranks, in their order; small plain Python values."""
        gathered = [value] * self.topology.world
        if self.topology.world > 1:
            dist.all_gather_object(gathered, value)
        return gathered


Microbatch = TypeVar("Microbatch")
Loss = TypeVar("Loss", bound=HasLoss)


class WholeModelEngine(Engine[Sequence[Microbatch], Loss], Generic[Microbatch, Loss]):
    """One module, whole on every data-parallel rank, whose forward(batch) returns something with a `.loss` to sum.

    build: makes it, values not yet set. step: microbatches of a global step over all ranks.
    """

    def __init__(
        self,
        build: Callable[[], TypedModule[[Microbatch], Loss]],
        config: RunConfig,
        topology: Topology,
        device: torch.device,
        step: int,
    ) -> None:
        super().__init__(config, topology, device)
        self.settings = deepspeed_config(config, step // topology.data_size, topology.data_size)
        self.whole = ZeroEngine(build, config, EngineGroups.of_decoder(topology), self.settings, device)
        self.parts = [self.whole]

    def forward_backward(self, step: Sequence[Microbatch], weight: float, collect: Callable[[Loss], None]) -> None:
        scale = self.topology.data_size / weight  # DeepSpeed averages over the data-parallel ranks
        with self.whole.kept():
            for index, batch in enumerate(step):
                output = self.whole.forward(batch)
                self.whole.backward(output.loss * scale, boundary=index == len(step) - 1)
                collect(output)

    def evaluate(self, step: Sequence[Microbatch], collect: Callable[[Loss], None]) -> None:
        with self.whole.evaluating(), self.whole.kept():
            for batch in step:
                collect(self.whole.forward(batch))
