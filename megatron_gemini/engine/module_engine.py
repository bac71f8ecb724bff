"""What engines have in common, whether their module is trained or not: its ranks, its precision, its pieces."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Generic, ParamSpec, Protocol, TypeVar

import torch
from torch import nn

from megatron_gemini.config.run import RunConfig
from megatron_gemini.engine.groups import EngineGroups, ModelParallelUnit
from megatron_gemini.engine.internals import gathering, unused
from megatron_gemini.engine.internals.fragments import Fragment
from megatron_gemini.engine.internals.partitioned import fill_initial_values
from megatron_gemini.engine.internals.types import CallableEngine
from megatron_gemini.engine.settings import JsonObject
from megatron_gemini.parallel.parameters import placement_of

P = ParamSpec("P")
Output = TypeVar("Output")
Output_co = TypeVar("Output_co", covariant=True)


Between = tuple[torch.Tensor]
"""What a pipeline stage hands on to the one after."""


class HasLoss(Protocol):
    """What a trained model gives at its end: `loss` is a scalar with a graph, a sum over the microbatch."""

    @property
    def loss(self) -> torch.Tensor: ...


class TypedModule(Protocol[P, Output_co]):
    """An nn.Module by its forward, which tells an engine's own."""

    def forward(self, *args: P.args, **kwargs: P.kwargs) -> Output_co: ...


class ModuleEngine(ABC, Generic[P, Output]):
    """A module on the ranks of `groups`. stage: ZeRO's.

    module: its parameters have the names of the whole model. deepspeed: None where DeepSpeed has nothing to do.
    fragments: this rank's pieces of the parameters. gathers: whether weights are gathered before use. keeps: whether
    they are few enough to stay gathered through a step. divided: whether each data rank has pieces of its own; else all
    have the same.
    """

    module: nn.Module
    deepspeed: CallableEngine[P, Output] | None
    fragments: list[Fragment]
    gathers: bool
    keeps: bool
    divided: bool

    def __init__(self, config: RunConfig, groups: EngineGroups, stage: int, device: torch.device) -> None:
        self.config, self.groups, self.stage, self.device = config, groups, stage, device
        self.dtype = torch.bfloat16 if config.engine.precision == "bf16" else torch.float32
        self.unit = ModelParallelUnit(groups) if groups.data_group is not None else None
        if device.type == "cpu":
            unused.no_ranges()

    @abstractmethod
    def forward(self, *inputs: P.args, **named: P.kwargs) -> Output:
        """The module's own."""

    @abstractmethod
    def evaluating(self) -> contextlib.AbstractContextManager[None]:
        """Forward only, without a graph."""

    def alone(self) -> contextlib.AbstractContextManager[None]:
        """Inside, DeepSpeed sees the groups of this engine and no other's."""
        return gathering.within(self.groups.data_group, self.unit)

    def build(self, build: Callable[[], TypedModule[P, Output]], settings: JsonObject, trained: bool) -> nn.Module:
        """The module with its initial values, in this engine's precision; under ZeRO-3 each layer is divided at once.

        To be called inside `alone`.
        """
        import deepspeed

        context: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if self.stage == 3:
            gathering.install()
            # No dtype argument: it is followed only where fp16 is supported, and weights on a CPU became bf16 whatever
            # it said. Without it DeepSpeed 0.19 follows `settings`.
            context = deepspeed.zero.Init(
                data_parallel_group=self.groups.data_group, config_dict_or_path=settings, mpu=self.unit
            )
        with context:
            module = build()
        assert isinstance(module, nn.Module)
        if not trained:
            module.requires_grad_(False).eval()  # without dropout and its like
        # Behind all constructors: values depend on a parameter's name in the whole model, which its layer does not
        # know.
        fill_initial_values(module, self.config.train.seed)
        return module.to(device=self.device, dtype=self.dtype)

    def hold(self) -> None:
        """Gather all weights in one go and keep them until `release`, for several forwards or backwards."""
        assert self.deepspeed is not None and self.gathers
        gathering.hold(self.deepspeed)

    def release(self) -> None:
        """End `hold`."""
        assert self.deepspeed is not None
        gathering.release(self.deepspeed)

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """All forwards and backwards of a step, or of an evaluation: weights stay gathered inside, if it `keeps`."""
        if not self.keeps:
            yield
            return
        self.hold()
        try:
            yield
        finally:
            self.release()

    def owned(self) -> list[Fragment]:
        """The pieces that this rank answers for, so that every element of the model is one rank's, once.

        A shard is its holder's; of a replicated parameter, the first model rank's; of a tied one, the original's.
        """
        if not self.divided and self.groups.data_rank != 0:
            return []
        placed = [(fragment, placement_of(fragment.parameter)) for fragment in self.fragments if fragment.count]
        first = self.groups.model_rank == 0
        return [fragment for fragment, p in placed if not p.copy and (first or p.sharded_dim is not None)]
