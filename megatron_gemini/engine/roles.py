"""Models beside the policy in one job: a reference, a reward model, a value model, each on engines of its own.

What an engine trains by itself is the policy. A role is another model over the same ranks, under a name. A frozen role
runs forward only, at a ZeRO stage of its own. A trained role has a loss of its own and joins the policy's step: one
global norm, one decision to skip. A head that reads the policy's hidden states belongs into the policy's module, since
gradients do not pass from one role to another.

What a resume needs of a role:

- A trained role is in every checkpoint, with its moments, like the policy.
- A frozen role equals what it began as. It is left out of checkpoints, which would otherwise hold the same weights
  every time, and a resumed run makes it again from the same origin: the seed, or the checkpoints of `init_from`. Each
  checkpoint records the origin. Loading raises ValueError where it is another one, since the run would silently go on
  against another reference.
- A frozen role with `saved` is in every checkpoint. That costs the bytes of its weights, and makes a run independent
  of the origin, which may then be deleted. So may that of a trained role.

What fills an engine fills its roles too: `checkpoint.init_from.initialize` at a run's beginning, and
`checkpoint.load.load` where it goes on.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Generic, Literal, TypeVar, cast

import torch

from megatron_gemini.config.init_from import InitFromConfig
from megatron_gemini.config.run import RunConfig
from megatron_gemini.engine.frozen import FrozenEngine
from megatron_gemini.engine.groups import EngineGroups
from megatron_gemini.engine.module_engine import Between, HasLoss, ModuleEngine, TypedModule
from megatron_gemini.engine.settings import JsonObject, at_stage, second_engine
from megatron_gemini.engine.zero import ZeroEngine
from megatron_gemini.parallel.topology import Topology

if TYPE_CHECKING:
    from megatron_gemini.engine.pipeline import Pipeline

Row = TypeVar("Row")
Output = TypeVar("Output")


@dataclass(frozen=True)
class RoleSpec(Generic[Output]):
    """What a role is.

    name: in checkpoints and messages; without a colon.
    build: makes the stage of this number; values not yet set, parameters with their names in the whole model. Its
        forward(h or nothing, row=...) returns (h,), or an Output on the last stage, with a `.loss` if it is trained.
    place: "pipeline" divides it into as many stages as the policy; "last" puts the whole beside the policy's last one.
    between: a tensor of the shape and dtype of what its stages hand on; None: as the policy's.
    trained: else it is frozen. zero_stage: of its own; None: the policy's. lr_scale: multiple of the policy's rate.
    init_from: weights that it begins with, by a map of names as in a run's own `init_from`; a reward model takes the
        decoder of a policy, and keeps a head of its own. What none of them names has initial values of the run's seed.
    saved: whether checkpoints hold it though it is frozen.
    """

    name: str
    build: Callable[[int], TypedModule[..., Output | Between]]
    place: Literal["pipeline", "last"] = "pipeline"
    between: torch.Tensor | None = None
    trained: bool = False
    zero_stage: int | None = None
    lr_scale: float = 1.0
    init_from: tuple[InitFromConfig, ...] = ()
    saved: bool = False


class Role(Generic[Output]):
    """A role's stages on this rank, ready to run. Collective: all ranks make and run it in the same order.

    settings: DeepSpeed's dictionary of the policy's engine. trained: the engines that take part in the norm and the
        update. origin: what it began as, in words that tell it from any other beginning; empty until it is filled.
    """

    def __init__(
        self, spec: RoleSpec[Output], config: RunConfig, settings: JsonObject, topology: Topology, device: torch.device
    ) -> None:
        assert ":" not in spec.name, spec.name
        self.spec, self.topology = spec, topology
        stage = config.engine.zero_stage if spec.zero_stage is None else spec.zero_stage
        config = replace(config, engine=at_stage(config.engine, stage))
        settings, groups = second_engine(settings, config.engine), EngineGroups.of_decoder(topology)
        stages = range(topology.pipeline_rank, topology.pipeline_size * topology.virtual_stages, topology.pipeline_size)
        if spec.place == "last":
            stages = range(int(topology.last_stage_here))
        kind = ZeroEngine if spec.trained else FrozenEngine
        self.engines: list[ModuleEngine[..., Output | Between]] = [
            kind(functools.partial(spec.build, number), config, groups, settings, device) for number in stages
        ]
        self.trained = [engine for engine in self.engines if isinstance(engine, ZeroEngine)]
        self.in_checkpoints = spec.trained or spec.saved
        self.origin = "" if spec.init_from else f"the initial values of seed {config.train.seed}"
        self._pipeline: Pipeline[Output] | None = None
        if spec.place == "pipeline" and topology.pipeline_size > 1:
            from megatron_gemini.engine.pipeline import Pipeline  # its schedules take long to import

            assert spec.between is not None, "a pipeline must know what its stages hand on"
            self._pipeline = Pipeline(self.engines, topology, config.parallel.schedule, spec.between)

    def forward(self, rows: Sequence[Row]) -> list[Output]:
        """What the model gives for each row, without a graph, on the ranks that have its last stage; [] elsewhere."""
        outputs: list[Output] = []
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            for engine in self.engines:
                stack.enter_context(engine.evaluating())
            self._run(rows, outputs.append, None)
        return outputs

    def forward_backward(self, rows: Sequence[Row], scale: float, collect: Callable[[Output], None]) -> None:
        """Gradients of scale * the sum of the rows' losses, of a trained role, once in every step of the engine.

        scale: the number of ranks that hold the same weights, since DeepSpeed averages over them, divided by the sum
            of the step's loss weights.
        collect: called with every output of the last stage, on its ranks.
        """
        assert self.spec.trained, self.spec.name
        self._run(rows, collect, scale)

    def _run(self, rows: Sequence[Row], collect: Callable[[Output], None], scale: float | None) -> None:
        assert self.origin, f"the role {self.spec.name} has not been filled: initialize the engine, or load it"
        if self._pipeline is not None:
            self._pipeline.run(rows, collect, scale)
            return
        for engine in self.engines:  # one, or none
            with engine.kept():
                for index, row in enumerate(rows):
                    output = cast(Output, engine.forward(row=row))
                    if scale is not None and isinstance(engine, ZeroEngine):
                        engine.backward(cast(HasLoss, output).loss * scale, boundary=index == len(rows) - 1)
                    collect(output)
