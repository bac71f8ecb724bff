"""Which ranks form which group. megatron-core's parallel_state makes the groups; nobody else asks it for them."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed import ProcessGroup

from megatron_gemini.config.training import ParallelConfig


@dataclass(frozen=True)
class Topology:
    """This rank's place in the world. The groups are None in a serial process.

    Tensor-parallel ranks are neighbours: rank = data_rank * tensor_size + tensor_rank.
    """

    world: int = 1
    rank: int = 0
    tensor_size: int = 1
    tensor_rank: int = 0
    tensor_group: ProcessGroup | None = None
    data_size: int = 1
    data_rank: int = 0
    data_group: ProcessGroup | None = None

    @staticmethod
    def serial() -> Topology:
        """One process, no collectives."""
        return Topology()


def build_topology(parallel: ParallelConfig, backend: str) -> Topology:
    """Divide the world of the launcher (torchrun's or DeepSpeed's environment) into tensor- and data-parallel groups.

    Joins the world over `backend` ("gloo" or "nccl") unless torch.distributed is initialised already. A world of one
    process needs no groups and imports nothing. Raises ValueError if `parallel.tensor` does not divide the world.
    """
    world = dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))
    if world % parallel.tensor:
        raise ValueError(
            f"parallel.tensor is {parallel.tensor}, which does not divide the {world} ranks of this job; "
            f"start a multiple of {parallel.tensor} ranks or lower parallel.tensor"
        )
    if world == 1:
        return Topology.serial()
    if not dist.is_initialized():
        dist.init_process_group(backend)

    from megatron.core import parallel_state  # takes seconds: a serial process never pays for it

    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor, create_gloo_process_groups=False
        )
    tensor_group = parallel_state.get_tensor_model_parallel_group()
    data_group = parallel_state.get_data_parallel_group()
    if tensor_group.size() != parallel.tensor:
        raise ValueError(
            f"this process already runs with {tensor_group.size()} tensor-parallel ranks, not {parallel.tensor}; "
            "one process can hold one layout"
        )
    return Topology(
        world=world,
        rank=dist.get_rank(),
        tensor_size=tensor_group.size(),
        tensor_rank=tensor_group.rank(),
        tensor_group=tensor_group,
        data_size=data_group.size(),
        data_rank=data_group.rank(),
        data_group=data_group,
    )
