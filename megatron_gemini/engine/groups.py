"""The process groups of one DeepSpeed engine, told explicitly, under the names that DeepSpeed asks for (its mpu).

Without groups of its own, an engine that is created second inherits the first one's.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.distributed import ProcessGroup

from megatron_gemini.parallel.topology import Topology


@dataclass(frozen=True)
class EngineGroups:
    """The ranks of one engine. The groups are None in a serial process.

    data: ranks with the same weights, over which ZeRO divides and gradients are averaged. model: ranks that hold other
    parts of the same weights (tensor parallel), or the same replicated ones.
    """

    data_size: int = 1
    data_rank: int = 0
    data_group: ProcessGroup | None = None
    model_size: int = 1
    model_rank: int = 0
    model_group: ProcessGroup | None = None

    @staticmethod
    def of_decoder(topology: Topology) -> EngineGroups:
        """Of a pipeline stage: data and context ranks average, tensor-parallel ranks are its model-parallel ones."""
        return EngineGroups(
            topology.shard_size,
            topology.shard_rank,
            topology.shard_group,
            topology.tensor_size,
            topology.tensor_rank,
            topology.tensor_group,
        )


class ModelParallelUnit:
    """`groups` as DeepSpeed's mpu. A pipeline is several engines, none of which knows of it."""

    def __init__(self, groups: EngineGroups) -> None:
        self._groups = groups

    def get_data_parallel_group(self) -> ProcessGroup | None:
        return self._groups.data_group

    def get_data_parallel_rank(self) -> int:
        return self._groups.data_rank

    def get_data_parallel_world_size(self) -> int:
        return self._groups.data_size

    def get_model_parallel_group(self) -> ProcessGroup | None:
        return self._groups.model_group

    def get_model_parallel_rank(self) -> int:
        return self._groups.model_rank

    def get_model_parallel_world_size(self) -> int:
        return self._groups.model_size

    # DeepSpeed's ZeRO-1 and 2 ask by the names above, its engine and what all its optimizers share by these.
    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size

    def get_pipeline_model_parallel_rank(self) -> int:
        return 0

    def get_pipeline_model_parallel_world_size(self) -> int:
        return 1
