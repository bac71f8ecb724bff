"""AdamW over parameter groups: with weight decay, and without (norms, biases, embeddings)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypedDict

import torch
from torch import nn

from megatron_gemini.config.run import RunConfig
from megatron_gemini.parallel.parameters import placement_of


class ParameterGroup(TypedDict):
    """As torch's optimizers take them."""

    params: list[nn.Parameter]
    weight_decay: float


def parameter_groups(named: Iterable[tuple[str, nn.Parameter]], weight_decay: float) -> list[ParameterGroup]:
    """Trainable parameters in groups. Matrices decay; vectors (norms, biases) and embeddings do not.

    A weight that another pipeline stage also holds is a group of its own. ZeRO-1 and 2 cut a group without regard to
    its parameters, and must cut this weight at the same places on both stages.
    """
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    tied: list[nn.Parameter] = []
    for name, parameter in named:
        if not parameter.requires_grad:
            continue
        placement = placement_of(parameter)
        matrix = len(placement.global_shape) >= 2  # a ZeRO-3 parameter itself has an empty shape
        group = tied if placement.tied else decayed if matrix and "embedding" not in name else plain
        group.append(parameter)
    rates = ((decayed, weight_decay), (plain, 0.0), (tied, 0.0))
    return [{"params": params, "weight_decay": rate} for params, rate in rates if params]


def build_optimizer(groups: list[ParameterGroup], config: RunConfig, on_gpu: bool) -> torch.optim.Optimizer:
    """torch's fused AdamW, or DeepSpeed's CPU Adam where `engine.adam` says so."""
    chosen, offloaded = config.optimizer, config.engine.offload_optimizer != "none"
    # Some of DeepSpeed's wrappers step once on zero gradients while they are built: a rate of 0 keeps the weights.
    rate, betas = 0.0, (chosen.beta1, chosen.beta2)
    if config.engine.adam == "deepspeed" or (config.engine.adam == "auto" and offloaded and on_gpu):
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, lr=rate, betas=betas, eps=chosen.eps, adamw_mode=True)
    return torch.optim.AdamW([{**group} for group in groups], lr=rate, betas=betas, eps=chosen.eps, fused=True)
