"""Which ranks form which group. megatron-core's parallel_state makes the groups; nobody else asks it for them."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed import ProcessGroup

from megatron_gemini.config.engine import ParallelConfig


@dataclass(frozen=True)
class Topology:
    """This rank's place in the world. The groups are None in a serial process.

    Tensor-parallel ranks are neighbors, then come context, data and pipeline, as megatron-core orders them:
    rank = ((pipeline_rank * data_size + data_rank) * context_size + context_rank) * tensor_size + tensor_rank.

    tensor: ranks that divide the layers' weights; sequence: they also divide the tokens between the layers.
    context: ranks that divide the tokens of a row. pipeline: ranks that divide the layers. data: ranks that hold other
    rows. shard: context x data, which hold the same weights; ZeRO divides and averages gradients over them.
    tied_group: the first and the last pipeline rank, which both hold a tied embedding; None on the others.
    """

    world: int = 1
    rank: int = 0
    tensor_size: int = 1
    tensor_rank: int = 0
    tensor_group: ProcessGroup | None = None
    sequence: bool = False
    context_size: int = 1
    context_rank: int = 0
    context_group: ProcessGroup | None = None
    pipeline_size: int = 1
    pipeline_rank: int = 0
    pipeline_group: ProcessGroup | None = None
    virtual_stages: int = 1
    data_size: int = 1
    data_rank: int = 0
    data_group: ProcessGroup | None = None
    shard_size: int = 1
    shard_rank: int = 0
    shard_group: ProcessGroup | None = None
    tied_group: ProcessGroup | None = None

    @staticmethod
    def serial() -> Topology:
        """One process, no collectives."""
        return Topology()

    @property
    def last_stage_here(self) -> bool:
        """Whether this rank holds the head and the loss."""
        return self.pipeline_rank == self.pipeline_size - 1

    @property
    def counts_row_once(self) -> bool:
        """Whether this rank counts what all peers that share its rows (tensor, context, pipeline) know."""
        return self.last_stage_here and self.context_rank == 0 and self.tensor_rank == 0


def build_topology(parallel: ParallelConfig, backend: str) -> Topology:
    """Divide the world of the launcher (torchrun's or DeepSpeed's environment) into groups along every axis.

    Joins the world over `backend` ("gloo" or "nccl") unless torch.distributed is initialized already. A world of one
    process needs no groups and imports nothing. Raises ValueError if the layout does not divide the world.
    """
    world = dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))
    layout = parallel.tensor * parallel.context * parallel.pipeline
    if world % layout:
        raise ValueError(
            f"parallel.tensor x context x pipeline is {layout}, which does not divide the {world} ranks of this job; "
            f"start a multiple of {layout} ranks or lower one of them"
        )
    # torch.distributed may be running all the same, for an engine: its groups of one rank are of no use to a layer.
    if world == 1:
        return Topology.serial()
    if not dist.is_initialized():
        dist.init_process_group(backend)

    from megatron.core import parallel_state as groups  # takes seconds: a serial process never pays for it

    # megatron-core keeps its groups in globals and makes them once a process; whether they are the right ones is
    # checked.
    if not groups.model_parallel_is_initialized():
        groups.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor,
            context_parallel_size=parallel.context,
            pipeline_model_parallel_size=parallel.pipeline,
            create_gloo_process_groups=False,  # a second set for the CPU, which nothing here uses
        )
    place = _place_in_groups(parallel)
    found = (place.tensor_size, place.context_size, place.pipeline_size)
    asked = (parallel.tensor, parallel.context, parallel.pipeline)
    if found != asked:
        raise ValueError(
            f"this process already runs with tensor x context x pipeline {found}, not {asked}; "
            "one process can hold one layout"
        )
    return place


def _place_in_groups(parallel: ParallelConfig) -> Topology:
    """This rank's place in the groups that megatron-core has made."""
    from megatron.core import parallel_state as groups

    tensor, context = groups.get_tensor_model_parallel_group(), groups.get_context_parallel_group()
    pipeline, data = groups.get_pipeline_model_parallel_group(), groups.get_data_parallel_group()
    shard = groups.get_data_parallel_group(with_context_parallel=True)
    # Asking for megatron-core's embedding group, of the stages that hold a tied embedding, is an error on the others.
    ends = pipeline.size() > 1 and pipeline.rank() in (0, pipeline.size() - 1)
    return Topology(
        world=dist.get_world_size(),
        rank=dist.get_rank(),
        tensor_size=tensor.size(),
        tensor_rank=tensor.rank(),
        tensor_group=tensor,
        sequence=parallel.sequence,
        context_size=context.size(),
        context_rank=context.rank(),
        context_group=context,
        pipeline_size=pipeline.size(),
        pipeline_rank=pipeline.rank(),
        pipeline_group=pipeline,
        virtual_stages=parallel.virtual_stages,
        data_size=data.size(),
        data_rank=data.rank(),
        data_group=data,
        shard_size=shard.size(),
        shard_rank=shard.rank(),
        shard_group=shard,
        tied_group=groups.get_embedding_group() if ends else None,
    )
