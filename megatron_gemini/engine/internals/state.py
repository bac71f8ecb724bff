"""The optimizer below DeepSpeed's wrapper: its moments, its count of steps, and the weights that the forward reads."""

from __future__ import annotations

from typing import Any

import torch

from megatron_gemini.engine.internals.fragments import MOMENTS, fragments
from megatron_gemini.engine.internals.swapping import SwappedGroups, put_back


def basic_optimizer(engine: Any) -> torch.optim.Optimizer:
    """The optimizer below DeepSpeed's wrapper."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def _flat_masters(engine: Any) -> list[torch.Tensor]:
    """The tensors that the basic optimizer steps on this rank."""
    optimizer = engine.optimizer
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        return list(optimizer.fp32_partitioned_groups_flat)
    return [p for group in basic_optimizer(engine).param_groups for p in group["params"]]


def ensure_moments(engine: Any) -> None:
    """Make Adam's moments exist (zeros), as a resume needs before it fills them."""
    basic = basic_optimizer(engine)
    groups: SwappedGroups | None = getattr(engine, "swapped_groups", None)
    for number, master in enumerate(_flat_masters(engine)):
        if groups is not None:
            groups.enter(number, changes_state=True)
        for key in MOMENTS:
            if key not in basic.state[master]:
                basic.state[master][key] = torch.zeros_like(master.data)
    put_back(engine)


def set_step_count(engine: Any, steps: int) -> None:
    """Set Adam's count of updates wherever moments exist.

    Some wrappers make the moments by a step on zero gradients when they are built, which counts as one.
    """
    basic = basic_optimizer(engine)
    for master in _flat_masters(engine):
        state = basic.state.get(master)
        if not state:
            continue
        as_tensor = isinstance(basic, torch.optim.AdamW)
        state["step"] = torch.tensor(float(steps), device=master.device) if as_tensor else steps


def has_moments(engine: Any) -> bool:
    """Whether a first step has made Adam's moments."""
    basic = basic_optimizer(engine)
    return all(MOMENTS[0] in basic.state.get(master, {}) for master in _flat_masters(engine))


@torch.no_grad()
def publish_masters(engine: Any) -> None:
    """Copy the master weights into the weights that the forward reads, on every rank."""
    optimizer = engine.optimizer
    if hasattr(optimizer, "update_lp_params"):  # ZeRO-1 and 2
        optimizer.update_lp_params()
    elif hasattr(optimizer, "fp32_partitioned_groups_flat"):  # ZeRO-3
        for fragment in fragments(engine):
            partitioned: Any = fragment.parameter
            partitioned.ds_tensor.data.narrow(0, 0, fragment.count).copy_(fragment.master())
    elif hasattr(optimizer, "fp32_groups"):
        for low_group, high_group in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            for low, high in zip(low_group, high_group, strict=True):
                low.data.copy_(high.data)
