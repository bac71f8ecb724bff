"""AdamW over parameter groups: with weight decay, and without (norms, biases, embeddings)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypedDict

import torch
from torch import nn

from megatron_gemini.config.run import RunConfig
from megatron_gemini.parallel.parameters import placement_of


class ParameterGroup(TypedDict):
    """As torch's optimizers take them. lr_scale: the learning rate as a multiple of that of a step."""

    params: list[nn.Parameter]
    weight_decay: float
    lr_scale: float


def parameter_groups(
    named: Iterable[tuple[str, nn.Parameter]], weight_decay: float, lr_scales: Mapping[str, float]
) -> list[ParameterGroup]:
    """Trainable parameters in groups. Matrices decay; vectors (norms, biases) and embeddings do not.

    A weight that another pipeline stage also holds is a group of its own. ZeRO-1 and 2 cut a group without regard to
    its parameters, and must cut this weight at the same places on both stages.
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
        {"params": params, "weight_decay": decay, "lr_scale": scale}
        for (_, decay, scale), params in sorted(groups.items(), key=lambda each: each[0])
    ]


def build_optimizer(groups: list[ParameterGroup], config: RunConfig, on_gpu: bool) -> torch.optim.Optimizer:
    """torch's fused AdamW, or DeepSpeed's CPU Adam where `engine.adam` says so."""
    chosen, offloaded = config.optimizer, config.engine.offload_optimizer != "none"
    # Some of DeepSpeed's wrappers step once on zero gradients while they are built: a rate of 0 keeps the weights.
    rate, betas = 0.0, (chosen.beta1, chosen.beta2)
    if config.engine.adam == "deepspeed" or (config.engine.adam == "auto" and offloaded and on_gpu):
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, lr=rate, betas=betas, eps=chosen.eps, adamw_mode=True)
    return torch.optim.AdamW([{**group} for group in groups], lr=rate, betas=betas, eps=chosen.eps, fused=True)
