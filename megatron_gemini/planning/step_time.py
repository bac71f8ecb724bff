"""How long a step may take: arithmetic, what the links add to it, the pipeline's bubble, and the update.

An estimate that ranks layouts. Collectives of tensor and context parallelism count as if nothing hid them. What ZeRO-3
gathers, and what its hooks take of the host, counts as far as it is longer than the same microbatch's arithmetic. The
arithmetic of encoders and connectors is not in it: the data decides. Of roles the arithmetic counts, and not what they
send.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

from megatron_gemini.config.engine import ParallelConfig
from megatron_gemini.config.model import ModelConfig
from megatron_gemini.config.run import RunConfig
from megatron_gemini.models.flops import model_flops_per_token
from megatron_gemini.planning.hardware import ARITHMETIC, HOOK, HOST, KEPT, LINKS, Gpu
from megatron_gemini.planning.job import Job
from megatron_gemini.planning.memory import MEDIA
from megatron_gemini.planning.parameters import Stage, reading_layers
from megatron_gemini.planning.traffic import held, kept, traffic
from megatron_gemini.registry import CONNECTORS

UPDATE = 30
"""Bytes that Adam moves a parameter: reads of weight, two moments and gradient, writes of the first three and bf16."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step by cause, on the slowest rank. bubble_share: idle share of the pipeline's time."""

    arithmetic: float
    tensor: float
    context: float
    pipeline: float
    zero: float
    bubble: float
    update: float
    bubble_share: float

    @property
    def total(self) -> float:
        return sum(self.causes().values())

    def causes(self) -> dict[str, float]:
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "bubble_share"}


def step_time(job: Job, gpu: Gpu, gpus_per_node: int) -> StepTime:
    """Of the rank whose microbatches take longest; the others wait for it."""
    links = Links(job, gpu, gpus_per_node)
    found = [_of_rank(job, rank, gpu, links) for rank in job.places]
    return max(found, key=lambda step: step.total)


def visible_keys(job: Job) -> float:
    """Keys that a token attends to on average: causal documents of a quarter of a row, as the stages are split for."""
    return job.config.data.row_tokens / 8


def model_flops(job: Job) -> float:
    """FLOPs that the model and its roles need for a step, without recomputation and encoders."""
    config = job.config
    alone = dataclasses.replace(
        config, parallel=ParallelConfig(), engine=dataclasses.replace(config.engine, recompute="none")
    )
    return config.train.rows_per_step * rank_flops(Job(alone, 1, job.vocabulary), 0)


def rank_flops(job: Job, pipeline_rank: int) -> float:
    """FLOPs of one microbatch on a rank, with what is recomputed, in the decoders of the policy and its roles."""
    found = _decoder_flops(job, job.config.model, job.stages_of(pipeline_rank), trained=True)
    for role in job.roles_of(pipeline_rank):
        if role.size.decoder is not None:
            found += _decoder_flops(job, role.size.decoder, role.stages, role.size.trained)
    return found


def _decoder_flops(job: Job, model: ModelConfig, stages: list[Stage], trained: bool) -> float:
    config = job.config
    queries, seen = model.heads * model.head_width, visible_keys(job)
    passes = 3 if trained else 1  # a backward does twice what a forward does
    layer = model_flops_per_token(dataclasses.replace(model, layers=1), 0, seen) * passes / 3
    if trained and config.engine.recompute != "none":  # the attention's forward again
        layer += 2 * model.width * (queries + 2 * model.kv_heads * model.head_width) + 4 * queries * seen
    if trained and config.engine.recompute == "full":
        # And the rest, but for the layer's last product: nobody reads what comes out of a layer that is computed again.
        layer += 2 * model.width * (queries + 2 * model.mlp_width)
    head = 2 * passes * model.width * job.vocabulary if stages[-1].last else 0
    tokens = config.data.row_tokens / config.parallel.context / config.parallel.tensor
    found = tokens * (sum(len(stage.layers) for stage in stages) * layer + head)
    layers = [number for stage in stages for number in stage.layers]
    return found + passes * reader_flops(dataclasses.replace(config, model=model), layers)


def reader_flops(config: RunConfig, layers: Iterable[int]) -> float:
    """FLOPs on a rank of one forward of what reads memories before these layers, of one row."""
    tokens, memory = config.data.row_tokens / config.parallel.context, MEDIA * config.data.row_tokens
    # A document has a quarter of the row's memory, of which a token sees on average the half that is before it.
    seen, found, here = memory / 8, 0.0, set(layers)
    for name, reading in reading_layers(config).items():
        section = config.encoders[name].connector
        reads = CONNECTORS.get(section.kind).reads
        if reads is not None:
            of_one = reads.flops(section, config.model, tokens, memory, seen, config.parallel.tensor)
            found += len(here.intersection(reading)) * of_one
    return found


class Links:
    """Bytes a second of a rank along every axis; ranks are placed as `parallel.topology` says, tensor innermost."""

    def __init__(self, job: Job, gpu: Gpu, gpus_per_node: int) -> None:
        parallel = job.config.parallel
        self._gpu, self._node = gpu, gpus_per_node
        inner = parallel.tensor * parallel.context
        self.tensor = self._ring(parallel.tensor, 1)
        self.context = self._ring(inner, parallel.tensor)
        self.data = self._ring(inner * job.data, parallel.tensor)
        # The next stage's rank is all data-parallel ranks away: on another node, unless one node holds two stages.
        self.pipeline = (gpu.network if inner * job.data * 2 > gpus_per_node else gpu.nvlink) * LINKS
        self.host = gpu.pcie * LINKS

    def _ring(self, span: int, stride: int) -> float:
        """Of ranks `stride` apart that reach over `span`: between nodes, a node's members share their adapters."""
        if span <= self._node:
            return self._gpu.nvlink * LINKS
        return min(self._gpu.nvlink, self._gpu.network * max(1, self._node // stride)) * LINKS


def _of_rank(job: Job, rank: int, gpu: Gpu, links: Links) -> StepTime:
    parallel, rows, sent = job.config.parallel, job.microbatches, traffic(job, rank)
    arithmetic = rank_flops(job, rank) / (gpu.peak(job.zero.bf16) * ARITHMETIC)
    tensor, context = sent.tensor / links.tensor, sent.context / links.context
    pipeline = sent.pipeline / links.pipeline
    each = sent.data / links.data
    # What ZeRO-3 gathers travels while the microbatch is computed, and its hooks run on the host meanwhile.
    exposed = max(0.0, each - arithmetic, _hooks(job, rank) - arithmetic) if job.zero.stage == 3 else each
    steps = rows * (arithmetic + tensor + context + pipeline + exposed)
    bubble = steps / rows * (parallel.pipeline - 1) / parallel.virtual_stages
    return StepTime(
        rows * arithmetic,
        rows * tensor,
        rows * context,
        rows * pipeline,
        rows * exposed + sent.step / links.data,
        bubble,
        _update(job, rank, gpu, links),
        bubble / (steps + bubble),  # (ranks - 1) / (rows * virtual + ranks - 1), as in Narayanan et al. 2021
    )


def _hooks(job: Job, rank: int) -> float:
    """Seconds of the host for one microbatch under ZeRO-3; weights that are whole anyway need no hooks."""
    config, stages = job.config, job.stages_of(rank)
    if not job.zero.gathers:
        return 0.0
    each = KEPT if held(job) or kept(job, stages) else HOOK
    # Modules with parameters of a layer: the attention's input and output, the MLP, and the two norms of its heads.
    modules = (5 if config.model.qk_norm else 3) * sum(len(stage.layers) for stage in stages)
    passes = 2 if config.engine.recompute == "none" else 3
    return passes * (modules + stages[0].first + 2 * stages[-1].last) * each


def _update(job: Job, rank: int, gpu: Gpu, links: Links) -> float:
    """Seconds for the optimizer where it is offloaded; on the GPU it takes next to none."""
    if job.config.engine.offload_optimizer == "none":
        return 0.0
    parameters = sum(stage.parameters for stage in job.stages_of(rank)) / job.zero.ranks
    parameters += sum(job.trained) / job.world
    for role in job.roles_of(rank):
        if role.size.trained and role.zero.offload_optimizer:
            parameters += sum(stage.parameters for stage in role.stages) / role.zero.ranks
    # ZeRO-3 sums gradients on the host: they come back to the GPU and go again with every further microbatch.
    moves = 1 + (2 * (job.microbatches - 1) if job.zero.stage == 3 else 0)
    copied = parameters * (4 * moves + job.zero.element)
    return copied / links.host + parameters * UPDATE / (gpu.host * HOST)
