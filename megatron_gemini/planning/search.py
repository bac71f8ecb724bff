"""Every legal layout of a job with every way to keep its state, judged by memory first and then by time."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from megatron_gemini.config.engine import ParallelConfig
from megatron_gemini.config.layout import layouts, why_not
from megatron_gemini.config.run import RunConfig
from megatron_gemini.planning.footprint import Footprint
from megatron_gemini.planning.hardware import Gpu
from megatron_gemini.planning.job import Job
from megatron_gemini.planning.memory import USABLE, rank_footprint
from megatron_gemini.planning.step_time import StepTime, model_flops, step_time
from megatron_gemini.planning.traffic import traffic

Offload = Literal["none", "cpu"]
STATES: tuple[tuple[int, Offload, Offload], ...] = (
    (0, "none", "none"),
    (1, "none", "none"),
    (1, "cpu", "none"),
    (2, "none", "none"),
    (2, "cpu", "none"),
    (3, "none", "none"),
    (3, "cpu", "none"),
    (3, "cpu", "cpu"),
)
"""ZeRO stage, where the optimizer lies, where the weights lie. Stage 0 is the first."""
RECOMPUTE: tuple[Literal["none", "selective", "full"], ...] = ("none", "selective", "full")
_SEARCHED = (
    *("engine.zero_stage", "engine.offload_optimizer", "engine.offload_parameters", "engine.recompute"),
    "encoder_engines.zero_stage",
)
LONG_ROW = 16_384
"""Tokens of a row from which context parallelism is worth a look without being asked for."""
ZERO3_PIPELINE = 1.05
"""ZeRO-3 in a pipeline must be faster by this factor than another state to be preferred. Every stage gathers its
weights in an order that the schedule dictates, and the estimate cannot tell what that costs."""


@dataclass(frozen=True)
class Machine:
    """gpu_memory: bytes of one GPU; host_memory: bytes of one node, for all of its gpus_per_node ranks."""

    gpu: Gpu
    gpu_memory: int
    host_memory: int
    gpus_per_node: int


@dataclass(frozen=True)
class LayoutPlan:
    """A layout on a machine. worst: pipeline rank whose GPU is fullest, and `footprint` what that rank holds."""

    job: Job
    machine: Machine
    worst: int
    footprint: Footprint
    host: float
    """Bytes of the fullest node's memory."""

    @property
    def lacks_gpu(self) -> float:
        """Bytes that the fullest GPU is short of; 0 if it fits."""
        return max(0.0, self.footprint.gpu.total - USABLE * self.machine.gpu_memory)

    @property
    def lacks_host(self) -> float:
        """Bytes that the fullest node's memory is short of; 0 if it fits."""
        return max(0.0, self.host - self.machine.host_memory)

    @property
    def fits(self) -> bool:
        return not self.lacks_gpu and not self.lacks_host

    @cached_property
    def time(self) -> StepTime:
        return step_time(self.job, self.machine.gpu, self.machine.gpus_per_node)

    @property
    def rows_per_second(self) -> float:
        """Packed rows, the samples of training."""
        return self.job.config.train.rows_per_step / self.time.total

    @property
    def mfu(self) -> float:
        """Model FLOPs utilization in [0, 1], without what is recomputed."""
        peak = self.machine.gpu.peak(self.job.zero.bf16) * self.job.world
        return model_flops(self.job) / (peak * self.time.total)

    @cached_property
    def sent(self) -> float:
        """Bytes that the busiest rank sends in a step."""
        return max(traffic(self.job, rank).total(self.job.microbatches) for rank in self.job.places)

    @cached_property
    def rank(self) -> tuple[float, ...]:
        """To sort by, the best first: what fits by time, the rest by what it lacks; ties to the simpler layout."""
        engine, parallel = self.job.config.engine, self.job.config.parallel
        careful = ZERO3_PIPELINE if engine.zero_stage == 3 and parallel.pipeline > 1 else 1.0
        seconds = self.time.total * careful if self.fits else 0.0
        axes = parallel.tensor * parallel.context * parallel.pipeline * parallel.virtual_stages + parallel.sequence
        return self.lacks_gpu + self.lacks_host, seconds, engine.zero_stage, axes, RECOMPUTE.index(engine.recompute)


def search(config: RunConfig, world: int, vocabulary: int, machine: Machine) -> list[LayoutPlan]:
    """For every legal layout of `config` on `world` GPUs its best plan, best layout first.

    The layout, the ZeRO stage, offload to the host (the optimizer's, and under ZeRO-3 the weights') and recomputation
    are chosen; all else is the configuration's. Raises a `ValueError` where no layout is legal.
    """
    found: dict[ParallelConfig, LayoutPlan] = {}
    for candidate in candidates(config, world):
        plan = judge(Job(candidate, world, vocabulary), machine)
        before = found.get(candidate.parallel)
        if before is None or plan.rank < before.rank:
            found[candidate.parallel] = plan
    if not found:
        raise ValueError(f"no layout of {world} GPUs is legal: as it is, {why_not(config, world)}")
    return sorted(found.values(), key=lambda plan: plan.rank)


def candidates(config: RunConfig, world: int) -> Iterator[RunConfig]:
    """Every legal configuration that differs from `config` in what is searched."""
    # Layouts first: the state and the activations decide no legality, and there are thirty of them for every layout.
    legal = [layout.parallel for layout in layouts(config, world)]
    if config.parallel.context == 1 and config.data.row_tokens < LONG_ROW:
        legal = [parallel for parallel in legal if parallel.context == 1] or legal
    states = list(_states(config))
    for parallel in legal:
        for state in states:
            yield dataclasses.replace(state, parallel=parallel)


def _states(config: RunConfig) -> Iterator[RunConfig]:
    """`config` with every way to keep its state and its activations.

    The encoders have the decoder's ZeRO stage, or stage 3 beside a lower one, unless the configuration says which.
    ZeRO-0 is left out in bf16, where it alone sums the gradients of microbatches in bf16.
    """
    free = config.encoder_engines.zero_stage < 0 and bool(config.enabled_encoders)
    for stage, optimizer, weights in STATES[config.engine.precision == "bf16" :]:
        for recompute in RECOMPUTE:
            engine = dataclasses.replace(
                config.engine,
                zero_stage=stage,
                offload_optimizer=optimizer,
                offload_parameters=weights,
                recompute=recompute,
                adam="auto",  # DeepSpeed's CPU Adam would be refused where the optimizer is not offloaded
            )
            yield dataclasses.replace(config, engine=engine)
            # ZeRO-1 keeps whole gradients, which encoders of billions of parameters beside a small stage cannot afford.
            if free and 0 < stage < 3:
                encoder_engines = dataclasses.replace(config.encoder_engines, zero_stage=3)
                yield dataclasses.replace(config, engine=engine, encoder_engines=encoder_engines)


def judge(job: Job, machine: Machine) -> LayoutPlan:
    """What a layout needs of a machine."""
    found = {rank: rank_footprint(job, rank) for rank in job.places}
    worst = max(found, key=lambda rank: found[rank].gpu.total)
    # A node may hold ranks of several places of the pipeline; as if all were the fullest.
    ranks = min(job.world, machine.gpus_per_node)
    host = ranks * max(footprint.host.total for footprint in found.values())
    return LayoutPlan(job, machine, worst, found[worst], host)


def alternatives(plan: LayoutPlan) -> list[tuple[str, LayoutPlan]]:
    """The same layout with one of its choices made the other way, and what was changed in words."""
    chosen, found = plan.job.config, []
    undecided = dataclasses.replace(chosen, encoder_engines=dataclasses.replace(chosen.encoder_engines, zero_stage=-1))
    for config in _states(undecided):
        changed = [name for name in _SEARCHED if _setting(config, name) != _setting(chosen, name)]
        if len(changed) == 1:
            words = f"{changed[0]} {_setting(config, changed[0])}"
            found.append((words, judge(dataclasses.replace(plan.job, config=config), plan.machine)))
    return found


def _setting(config: RunConfig, name: str) -> int | str:
    section, _, field = name.partition(".")
    return getattr(getattr(config, section), field)
