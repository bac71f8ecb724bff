"""AdamW over parameter groups: with weight decay, and without (norms, biases, embeddings)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from megatron_gemini.config.run import RunConfig
from megatron_gemini.parallel.parameters import placement_of

LR_SCALE = "lr_scale"
"""Key of a parameter group: its learning rate as a multiple of that of a step."""


def parameter_groups(
    named: Iterable[tuple[str, nn.Parameter]], weight_decay: float, lr_scales: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Trainable parameters in groups. Matrices decay; vectors (norms, biases) and embeddings do not.

    A weight that another pipeline stage also holds is a group of its own, so that ZeRO-1 and 2, which cut a group
    without regard to its parameters, cut it at the same places on both.
    lr_scales: of parameters by the beginning of their names; 1 for others.
    """
    groups: dict[tuple[int, float, float], list[nn.Parameter]] = {}
    for name, parameter in named:
        if not parameter.requires_grad:
            continue
        placement = placement_of(parameter)
        matrix = len(placement.global_shape) >= 2  # a ZeRO-3 parameter itself has an empty shape
        decays = matrix and "embedding" not in name and not placement.tied
        order = 2 if placement.tied else 0 if decays else 1
        scale = next((scale for begin, scale in lr_scales.items() if name.startswith(begin)), 1.0)
        groups.setdefault((order, weight_decay if decays else 0.0, scale), []).append(parameter)
    return [
        {"params": params, "weight_decay": decay, LR_SCALE: scale}
        for (_, decay, scale), params in sorted(groups.items(), key=lambda each: each[0])
    ]


def build_optimizer(groups: list[dict[str, Any]], config: RunConfig, on_gpu: bool) -> torch.optim.Optimizer:
    """torch's fused AdamW, or DeepSpeed's CPU Adam where `engine.adam` says so."""
    chosen, offloaded = config.optimizer, config.engine.offload_optimizer != "none"
    # Some of DeepSpeed's wrappers step once on zero gradients while they are built: a rate of 0 keeps the weights.
    arguments: dict[str, Any] = {"lr": 0.0, "betas": (chosen.beta1, chosen.beta2), "eps": chosen.eps}
    if config.engine.adam == "deepspeed" or (config.engine.adam == "auto" and offloaded and on_gpu):
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, adamw_mode=True, **arguments)
    return torch.optim.AdamW(groups, fused=True, **arguments)
