"""The most that a rank holds at once, on its GPU and on its host, at every place of the pipeline."""

from __future__ import annotations

import dataclasses

from megatron_gemini.config.model import ModelConfig
from megatron_gemini.config.run import RunConfig
from megatron_gemini.planning.activations import (
    RowShare,
    connector_saved,
    encoder_saved,
    layer_recomputed,
    layer_saved,
    loss_buffers,
    loss_saved,
    reader_saved,
)
from megatron_gemini.planning.footprint import Bytes, Footprint
from megatron_gemini.planning.job import Job
from megatron_gemini.planning.parameters import Stage, reading_layers, vocabulary_parameters
from megatron_gemini.planning.roles import PlannedRole
from megatron_gemini.planning.zero_state import (
    BUCKET,
    frozen_state,
    update_buffers,
    zero_buffers,
    zero_state,
)
from megatron_gemini.registry import ENCODERS, OBJECTIVES

LIBRARIES = 2.0e9
"""Bytes of a GPU that CUDA's context, NCCL's channels and cuBLAS's workspaces take. Assumed, not measured."""
PROCESS = 4.0e9
"""Bytes of host memory of a rank's process: Python, torch, CUDA's host side, pinned staging. Assumed, not measured."""
USABLE = 0.94
"""Share of a GPU's memory that tensors can fill before fragmentation ends it. Assumed, not measured."""
MEDIA = 0.5
"""Share of a row's tokens that are embeddings of images, frames or audio. Assumed: the data decides."""


def in_flight(job: Job, pipeline_rank: int) -> int:
    """Forwards of a rank's stages, a microbatch and stage each, that wait for their backward at the worst moment."""
    parallel, rows = job.config.parallel, job.microbatches
    ranks, virtual = parallel.pipeline, parallel.virtual_stages
    if ranks == 1:
        return 1
    if parallel.schedule == "breadth_first":
        return rows * virtual
    if parallel.schedule == "1f1b":
        return min(rows, ranks - pipeline_rank)
    # Interleaved (Narayanan et al. 2021, arXiv:2104.04473): the warm-up of torch's schedule, and the forward after it.
    return min(rows * virtual, (virtual - 1) * ranks + 2 * (ranks - 1 - pipeline_rank) + 1)


def rank_footprint(job: Job, pipeline_rank: int) -> Footprint:
    """Of the ranks at one place of the pipeline."""
    stages = job.stages_of(pipeline_rank)
    state = Footprint(host=Bytes(buffers=PROCESS + job.config.data.cache_bytes))
    for stage in stages:
        state += zero_state(stage.parameters, stage.largest, job.zero)  # every virtual stage has an engine
    state += _encoder_state(job)
    roles = job.roles_of(pipeline_rank)
    for role in roles:
        for stage in role.stages:
            trained = zero_state(stage.parameters, stage.largest, role.zero)
            state += trained if role.size.trained else frozen_state(stage.parameters, role.zero)
    working = _activations(job, pipeline_rank)
    passes = _zero_buffers(job, stages) + _backward_buffers(job, job.config.model, stages)
    for role in roles:
        passes = _with_role(passes, job, role)
    updated = [(job.zero, stages), *((role.zero, role.stages) for role in roles if role.size.trained)]
    update = max(update_buffers(stage.parameters, stage.largest, zero) for zero, each in updated for stage in each)
    # The update comes when the activations are gone. So only what it takes beyond them adds to the peak.
    buffers = LIBRARIES + max(passes, update - working.gpu.activations)
    return state + working + Footprint(Bytes(buffers=buffers))


def _with_role(passes: float, job: Job, role: PlannedRole) -> float:
    """Bytes that there are for a moment in the passes of the policy and of a role, which follow each other."""
    zero, size = role.zero, role.size
    # A frozen one has no buckets of gradients, and of the lower stages none gathers.
    each = [
        zero_buffers(stage.parameters, stage.largest, zero, bucket=BUCKET if size.trained else 0)
        for stage in role.stages
        if size.trained or zero.gathers
    ]
    kept = sum(each) if zero.stage == 3 else 0.0  # ZeRO-3 leaves buckets and weights where they are between passes
    own = 0.0 if zero.stage == 3 else max(each, default=0.0)
    if size.decoder is not None:
        own += _backward_buffers(job, size.decoder, role.stages)
    return kept + max(passes, own)


def _encoder_state(job: Job) -> Footprint:
    """Of every engine of encoders and connectors, which has all ranks."""
    zero = job.encoder_engines_zero
    # A frozen encoder is divided under ZeRO-3 alone. A frozen connector is whole on every rank even there: gradients of
    # its encoder pass through it outside of the engine's forward, where nothing would gather its weights.
    state = frozen_state(sum(job.frozen), zero)
    state += Footprint(Bytes(weights=job.frozen_connectors * zero.element))
    for parameters in job.trained:
        state += zero_state(parameters, 0, zero)
    return state


def _activations(job: Job, pipeline_rank: int) -> Footprint:
    """What autograd keeps: of the decoder during its passes, of encoders and connectors before and after them."""
    stages, waiting, config = job.stages_of(pipeline_rank), in_flight(job, pipeline_rank), job.config
    kept, host = _decoder_kept(job, config.model, stages, waiting)
    if stages[-1].last:
        share = RowShare.of(config)
        own = OBJECTIVES.get(config.objective.kind).loss_bytes
        kept += _losses_alive(job) * own(config.objective, config.model, share.context, share.element)
    for role in job.roles_of(pipeline_rank):  # whose passes come before the policy's
        mine, there = _role_kept(job, role, waiting)
        kept, host = max(kept, mine), max(host, there)
    over_the_step, after = _encoder_activations(job)
    return Footprint(
        Bytes(activations=over_the_step + max(kept + _embeddings(job, stages), after)), Bytes(activations=host)
    )


def _role_kept(job: Job, role: PlannedRole, waiting: int) -> tuple[float, float]:
    """As `_decoder_kept`; of a head alone nothing."""
    model = role.size.decoder
    if model is None:
        return 0.0, 0.0
    if not role.size.trained:  # without a graph a layer is gone before the next one begins
        return layer_saved(model, RowShare.of(job.config), "none"), 0.0
    return _decoder_kept(job, model, role.stages, waiting if role.size.place == "pipeline" else 1)


def _losses_alive(job: Job) -> int:
    """Rows whose loss waits for its backward."""
    parallel = job.config.parallel
    # Breadth-first runs the last stage's forward of every row before the first backward; the others, one by one.
    return job.microbatches if parallel.schedule == "breadth_first" and parallel.pipeline > 1 else 1


def _decoder_kept(job: Job, model: ModelConfig, stages: list[Stage], waiting: int) -> tuple[float, float]:
    """(bytes on the GPU, bytes on the host) of a decoder's layers and head while so many forwards wait."""
    config, share = dataclasses.replace(job.config, model=model), RowShare.of(job.config)
    mode = config.engine.recompute
    passes = waiting / len(stages)  # of every stage
    layers = sum(len(stage.layers) for stage in stages) * passes
    kept = layers * layer_saved(model, share, mode) + layer_recomputed(model, share, mode)
    # Readers stand between the layers and not in them: no recomputation covers them.
    memory = int(MEDIA * config.data.row_tokens)
    kept += passes * sum(reader_saved(config, stage.layers, share, memory) for stage in stages)
    host = 0.0
    if config.engine.offload_activations and mode != "none":
        inputs = layer_saved(model, share, "full")
        host = layers * inputs  # recomputation's own inputs are all that `parallel.recompute` offloads
        kept -= max(0.0, layers - 2) * inputs  # the one in use, and the one that is fetched ahead
    if stages[-1].last:
        rows = vocabulary_parameters(model, job.vocabulary, share.tensor) // model.width
        kept += _losses_alive(job) * loss_saved(model, rows, share, config.parallel.schedule == "breadth_first")
    return kept, host


def _embeddings(job: Job, stages: list[Stage]) -> float:
    """Embeddings of a step's media that a rank's stages place in the stream or read, and their gradients."""
    config, share = job.config, RowShare.of(job.config)
    readers, layers = reading_layers(config), {layer for stage in stages for layer in stage.layers}
    in_stream = stages[0].first and any(not each for each in readers.values())
    read = any(layers.intersection(each) for each in readers.values())
    # Each tensor- and context-parallel rank has its share of the stream, but all of a memory that it reads.
    tokens = in_stream * share.stream + read * share.row
    return 2 * MEDIA * job.microbatches * tokens * config.model.width * share.element


def _encoder_activations(job: Job) -> tuple[float, float]:
    """(bytes of encoders and connectors that live over the step, bytes that their backwards need beside those).

    An encoder works on chunks, connectors on all that a rank has encoded in a step: about an embedding an input, since
    the data decide what encoders merge. The encoder counts that needs most, as if all media were its own.
    """
    config, element = job.config, job.zero.element
    chunk, recompute = config.encoder_engines.chunk_tokens, config.encoder_engines.recompute
    embeddings = int(MEDIA * config.train.rows_per_step * config.data.row_tokens / job.world)
    over, after = 0.0, 0.0
    for name in config.enabled_encoders:
        encoder, section = ENCODERS.get(name), config.encoders[name]
        largest = min(encoder.largest_item(section), config.data.row_tokens)  # an item of more than a chunk is alone
        inputs = max(chunk if recompute else max(chunk, embeddings), largest)
        given = embeddings * encoder.output_width(section) * element  # kept for the connectors, and later its gradient
        kept = encoder_saved(config, name, inputs, element)
        connector = max(given, connector_saved(config, name, embeddings, element))
        over = max(over, given if recompute else kept + connector)
        after = max(after, max(kept, connector) if recompute else given)
    return over, after


def longest_item(config: RunConfig) -> tuple[str, int, float]:
    """(encoder, inputs of its longest item that a row can hold, bytes that are kept of it in its backward).

    `rank_footprint` counts chunks and common items. A clip of many large frames is more, and only the data know whether
    there is one. Of the encoder that keeps most; ("", 0, 0.0) where none keeps anything.
    """
    element = 2 if config.engine.precision == "bf16" else 4
    found = [("", 0, 0.0)]
    for name in config.enabled_encoders:
        inputs = min(config.data.row_tokens, ENCODERS.get(name).longest_item(config.encoders[name]))
        found.append((name, inputs, encoder_saved(config, name, inputs, element)))
    return max(found, key=lambda each: each[2])


def _zero_buffers(job: Job, stages: list[Stage]) -> float:
    """Of ZeRO's own during the passes."""
    zero = job.zero
    breadth_first = job.config.parallel.schedule == "breadth_first" and job.config.parallel.pipeline > 1
    held = max(stage.parameters for stage in stages) if zero.gathers and breadth_first else None
    decoder = [zero_buffers(stage.parameters, stage.largest, zero, held) for stage in stages]
    # Engines of encoders and connectors get buckets that are no larger than they are.
    beside = [(count, min(BUCKET, count)) for count in job.trained]
    encoders = sum(zero_buffers(count, 0, job.encoder_engines_zero, bucket=bucket) for count, bucket in beside)
    if zero.stage < 3:
        return max(decoder) + encoders  # ZeRO-2 frees its bucket after each backward; ZeRO-3 keeps it
    if held is not None:  # one stage is gathered at a time; every engine has its own bucket
        return sum(decoder) - (len(stages) - 1) * held * zero.element + encoders
    return sum(decoder) + encoders


def _backward_buffers(job: Job, model: ModelConfig, stages: list[Stage]) -> float:
    """Gradients of a layer while it runs, of the stream at both ends of a stage, and of the logits."""
    share = RowShare.of(job.config)
    # The MLP's backward holds most: gradients of gate, up and their product, and of four streams around it.
    inner = 3 * share.context * model.mlp_width / share.tensor + 4 * share.context * model.width
    weight = max(stage.largest for stage in stages)
    found = (inner + weight) * share.element
    if stages[-1].last:
        rows = vocabulary_parameters(model, job.vocabulary, share.tensor) // model.width
        found = max(found, loss_buffers(model, rows, share))
    return found
