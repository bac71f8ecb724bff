"""One rank's part of a job, built on a machine outside of it: groups that do nothing, tensors without memory."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import ProcessGroup

from megatron_gemini.config.run import RunConfig
from megatron_gemini.contracts import TokenLayout
from megatron_gemini.models.encoders import build_connector, build_encoder
from megatron_gemini.models.stage import DecoderStage, parts
from megatron_gemini.parallel.tensor.layers import LayerFactory
from megatron_gemini.parallel.topology import Topology, build_topology
from megatron_gemini.planning.job import Job
from megatron_gemini.planning.memory import rank_footprint


def dry_run(config: RunConfig, layout: TokenLayout, rank: int, world: int) -> str:
    """Build what rank `rank` of `world` would hold, on torch's meta device, and describe it.

    The layout must be legal. Raises RuntimeError where the modules do not have the parameters that planning counts.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    job = Job(config, world, layout.size)
    # A default process group of which only this rank exists: its collectives return at once, so that one machine can
    # build what a rank of a thousand would hold, by the code that training uses.
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        topology = build_topology(config.parallel, "fake")
        stages, encoders = build(config, layout, topology)
        lines = [*_place(topology), *_stages(stages, encoders, job, topology)]
    finally:
        dist.destroy_process_group()
    footprint = rank_footprint(job, topology.pipeline_rank)
    return "\n".join([*lines, f"GPU: {footprint.gpu}", f"host: {footprint.host}"])


def build(config: RunConfig, layout: TokenLayout, topology: Topology) -> tuple[list[DecoderStage], list[nn.Module]]:
    """(this rank's stages of the decoder, the encoders and connectors), without memory."""
    split = parts(config, layout, topology.pipeline_size * topology.virtual_stages)
    with torch.device("meta"):
        layers = LayerFactory(topology)
        mine = split[topology.pipeline_rank :: topology.pipeline_size]
        stages = [DecoderStage(config, layout, layers, part) for part in mine]
        encoders = [
            build(config, name) for name in config.enabled_encoders for build in (build_encoder, build_connector)
        ]
    return stages, encoders


def _place(topology: Topology) -> list[str]:
    axes: list[tuple[str, int, int, ProcessGroup | None]] = [
        ("tensor", topology.tensor_rank, topology.tensor_size, topology.tensor_group),
        ("context", topology.context_rank, topology.context_size, topology.context_group),
        ("pipeline", topology.pipeline_rank, topology.pipeline_size, topology.pipeline_group),
        ("data", topology.data_rank, topology.data_size, topology.data_group),
        ("shard", topology.shard_rank, topology.shard_size, topology.shard_group),
    ]
    lines = [f"rank {topology.rank} of {topology.world}"]
    for name, rank, size, group in axes:
        members = [topology.rank] if group is None else dist.get_process_group_ranks(group)
        shown = list(map(str, members))
        if len(shown) > 8:  # a group may have hundreds
            shown = [*shown[:3], "...", shown[-1]]
        lines.append(f"  {name:<8}  {rank} of {size}  ranks {', '.join(shown)}")
    return lines


def _stages(stages: list[DecoderStage], encoders: list[nn.Module], job: Job, topology: Topology) -> list[str]:
    lines = []
    planned = job.stages_of(topology.pipeline_rank)
    for number, (stage, plan) in enumerate(zip(stages, planned, strict=True)):
        part = stage.decoder.part
        ends = [name for name, here in (("embedding", part.first), ("norm, head and loss", part.last)) if here]
        what = ", ".join([f"layers {part.layers.start} to {part.layers.stop - 1}", *ends])
        index = topology.pipeline_rank + number * topology.pipeline_size
        lines.append(f"stage {index}: {what}; {_checked(_count([stage]), plan.parameters, f'stage {index}')}")
    if encoders:
        wanted = sum(job.trained) + sum(job.frozen) + job.frozen_connectors
        checked = _checked(_count(encoders), wanted, "all encoders and connectors together")
        lines.append(f"encoders and connectors: {checked}, shared by all ranks")
    return lines


def _count(modules: list[DecoderStage] | list[nn.Module]) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def _checked(built: int, planned: int, what: str) -> str:
    if built != planned:
        raise RuntimeError(
            f"{what} has {built} parameters, but planning counts {planned}; its formulas are out of date"
        )
    return f"{built:,} parameters, as planned"
