"""Bytes that one rank sends in a step, by the axis that makes it send them.

A ring of n ranks moves (n - 1) / n of what is gathered or scattered, and twice that for an all-reduce.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_gemini.engine.settings import LIVE
from megatron_gemini.planning.activations import RowShare
from megatron_gemini.planning.job import Job
from megatron_gemini.planning.parameters import Stage, key_heads_read
from megatron_gemini.planning.zero_state import ZeroPlan


@dataclass(frozen=True)
class Traffic:
    """Bytes sent. tensor, context, pipeline: of one microbatch. Gathers and reductions of ZeRO-3 and ZeRO-2 come with
    every microbatch too (`data`). Those of the other stages, and gathers for all microbatches, come once (`step`)."""

    tensor: float
    context: float
    pipeline: float
    data: float
    step: float

    def total(self, microbatches: int) -> float:
        """Of a whole step."""
        return (self.tensor + self.context + self.pipeline + self.data) * microbatches + self.step


def traffic(job: Job, pipeline_rank: int) -> Traffic:
    """Of the ranks at one place of the pipeline."""
    stages, share = job.stages_of(pipeline_rank), RowShare.of(job.config)
    parallel, last = job.config.parallel, len(job.stages) - 1
    model, recompute = job.config.model, job.config.engine.recompute
    layers = sum(len(stage.layers) for stage in stages)
    stream = share.context * model.width * share.element
    passes = 2 if recompute == "none" else 3  # of keys and values, which either recomputation needs again
    tensor = float(stream * _tensor_passes(layers, stages, parallel.sequence, recompute))
    if parallel.sequence and model.kv_heads % parallel.tensor:  # keys that all ranks need are made by tokens
        tensor += passes * layers * 2 * share.context * model.kv_heads * model.head_width * share.element
    tensor *= ring(parallel.tensor)
    keys = 2 * share.row * key_heads_read(model, parallel.tensor) * model.head_width * share.element
    context = ring(parallel.context) * keys * layers * passes
    numbers = [pipeline_rank + parallel.pipeline * number for number in range(len(stages))]
    # A hidden state to the next stage, a gradient to the one before; the first and the last stage have one neighbor.
    sent = sum((number < last) + (number > 0) for number in numbers) if last else 0
    parameters = sum(stage.parameters for stage in stages)
    gathers = 2 if held(job) else 1 if kept(job, stages) else 0
    each, once = _zero(parameters, job.zero, gathers)
    encoders = sum(sum(_zero(count, job.encoder_engines_zero, gathers=2)) for count in job.trained)
    return Traffic(tensor, context, sent * share.stream * model.width * share.element, each, once + encoders)


def ring(ranks: int) -> float:
    """Share of a gathered tensor that each of `ranks` sends."""
    return (ranks - 1) / ranks


def _tensor_passes(layers: int, stages: list[Stage], sequence: bool, recompute: str) -> int:
    """How often a stream of all tokens goes round: two branches a layer, there and back.

    An all-reduce goes twice. With sequence parallelism the backward gathers the stream of both branches once more. What
    runs again leaves out the sum at its end.
    """
    # Two branches, forward and backward, two ring passes each; sequence parallelism has two gathers more.
    layer = 10 if sequence else 8
    # A layer that is computed again skips the sum of its last product, whose output nobody reads.
    layer += {"none": 0, "selective": int(sequence), "full": 3 if sequence else 2}[recompute]
    return layers * layer + 2 * stages[0].first + 2 * stages[-1].last


def held(job: Job) -> bool:
    """Whether the schedule keeps ZeRO-3's weights gathered for all microbatches of a pass."""
    return job.config.parallel.schedule == "breadth_first" and job.config.parallel.pipeline > 1


def kept(job: Job, stages: Sequence[Stage]) -> bool:
    """Whether a rank's engines are so small that they keep ZeRO-3's weights gathered through a step."""
    few = max(stage.parameters for stage in stages) <= LIVE
    return few and job.zero.gathers and not job.zero.offload_parameters and not held(job)


def _zero(parameters: int, zero: ZeroPlan, gathers: int) -> tuple[float, float]:
    """(bytes every microbatch, bytes once a step) for gradients and weights.

    gathers: of the weights in a step, for all microbatches; 0: two for each of them.
    """
    whole = ring(zero.ranks) * parameters * zero.element
    # ZeRO-3 gathers weights in the forward and in the backward, and reduces gradients: three passes (ZeRO, section 7).
    if zero.stage == 3:
        return (whole, gathers * whole) if gathers else (3 * whole, 0.0)
    if zero.stage == 2:
        return 2 * whole, whole
    return 0.0, (3 if zero.stage else 2) * whole
