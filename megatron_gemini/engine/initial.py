"""Initial values under ZeRO: every rank fills the pieces that it holds, without any communication.

Values are a pure function of (seed, parameter name, global index), so each rank can generate the parameter it holds a
piece of, one at a time, and keep the piece.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from megatron_gemini.parallel.parameters import declare, initialize_parameter


@torch.no_grad()
def fill_initial_values(module: nn.Module, seed: int) -> None:
    """Set every parameter of `module`, whole or partitioned by ZeRO-3."""
    for name, parameter in module.named_parameters():
        if hasattr(parameter, "ds_tensor"):
            _fill_partitioned(name, parameter, seed)
        else:
            initialize_parameter(name, parameter, seed)


def _fill_partitioned(name: str, parameter: Any, seed: int) -> None:
    piece = parameter.ds_tensor
    whole = nn.Parameter(torch.empty(tuple(parameter.ds_shape), dtype=parameter.dtype, device=piece.device))
    initialize_parameter(name, declare(whole, parameter.init, parameter.placement), seed)
    start = piece.ds_numel * torch.distributed.get_rank(parameter.ds_process_group)
    count = max(0, min(piece.ds_numel, parameter.ds_numel - start))
    piece.data.zero_()
    piece.data.narrow(0, 0, count).copy_(whole.data.view(-1).narrow(0, min(start, parameter.ds_numel), count))
