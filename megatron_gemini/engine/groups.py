"""What DeepSpeed calls an mpu: the process groups of one engine, told explicitly.

Without one of its own, an engine that is created second inherits the first one's groups.
"""

from __future__ import annotations

import torch.distributed as dist

from megatron_gemini.parallel.topology import Topology


class ModelParallelUnit:
    """The groups of `topology` under the names DeepSpeed asks for; model parallel means tensor parallel."""

    def __init__(self, topology: Topology) -> None:
        self._topology = topology

    def get_data_parallel_group(self) -> dist.ProcessGroup | None:
        return self._topology.data_group

    def get_data_parallel_rank(self) -> int:
        return self._topology.data_rank

    def get_data_parallel_world_size(self) -> int:
        return self._topology.data_size

    def get_model_parallel_group(self) -> dist.ProcessGroup | None:
        return self._topology.tensor_group

    def get_model_parallel_rank(self) -> int:
        return self._topology.tensor_rank

    def get_model_parallel_world_size(self) -> int:
        return self._topology.tensor_size

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size

    def get_pipeline_model_parallel_rank(self) -> int:
        return 0

    def get_pipeline_model_parallel_world_size(self) -> int:
        return 1
