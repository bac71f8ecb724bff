"""DeepSpeed behind one small API: `forward_backward`, `step`, and the state that a checkpoint needs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from megatron_gemini.config.run import RunConfig
from megatron_gemini.engine import fragments as internals
from megatron_gemini.engine.deepspeed_config import deepspeed_config
from megatron_gemini.engine.groups import ModelParallelUnit
from megatron_gemini.engine.initial import fill_initial_values
from megatron_gemini.engine.norm import clip_gradients, global_norm
from megatron_gemini.engine.optimizer import build_optimizer, parameter_groups
from megatron_gemini.parallel.topology import Topology


@dataclass(frozen=True)
class StepResult:
    """What a step did. norm: global gradient norm before clipping; skipped: it was not finite."""

    norm: float
    skipped: bool


class Engine:
    """One DeepSpeed engine over one module.

    build: makes the module on this rank (its tensor-parallel shard), values not yet set. forward(batch) of the
        module returns something whose `.loss` is a sum to minimise, not a mean.
    rows: microbatches of a global step over all data-parallel ranks.
    """

    def __init__(
        self, build: Callable[[], nn.Module], config: RunConfig, topology: Topology, device: torch.device, rows: int
    ) -> None:
        import deepspeed

        self.config, self.topology, self.device = config, topology, device
        settings = deepspeed_config(config, rows, topology.data_size)
        unit = ModelParallelUnit(topology) if topology.world > 1 else None
        partitioned = config.engine.zero_stage == 3
        context: Any = contextlib.nullcontext()
        if partitioned:
            # No dtype argument: on a CPU, DeepSpeed takes bf16 whatever it says. It follows `settings` instead.
            context = deepspeed.zero.Init(
                data_parallel_group=topology.data_group, config_dict_or_path=settings, mpu=unit
            )
        with context:
            module = build()
        fill_initial_values(module, config.train.seed)
        module.to(device=device, dtype=self.dtype)
        groups = parameter_groups(module.named_parameters(), config.optimizer.weight_decay)
        optimizer = build_optimizer(groups, config, device.type == "cuda")
        self.deepspeed, *_ = deepspeed.initialize(
            model=module, optimizer=optimizer, model_parameters=groups, config=settings, mpu=unit
        )
        internals.silence_own_clipping(self.deepspeed)
        internals.set_step_count(self.deepspeed, 0)
        self.fragments = internals.fragments(self.deepspeed)

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.config.engine.precision == "bf16" else torch.float32

    @property
    def optimizer_name(self) -> str:
        """The optimizer's class, the ZeRO stage that divides it, and where its state lies."""
        zero = self.config.engine
        where = f", state offloaded to {zero.offload_optimizer}" if zero.offload_optimizer != "none" else ""
        return f"{internals.basic_optimizer(self.deepspeed).__class__.__name__}, ZeRO-{zero.zero_stage}{where}"

    @property
    def module(self) -> nn.Module:
        return self.deepspeed.module

    def forward_backward(self, batches: Sequence[Any], weight: float, collect: Callable[[Any], None]) -> None:
        """Gradients of sum(loss) / weight over this rank's microbatches and all data-parallel ranks.

        weight: the global step's sum of loss weights, over all ranks. collect: called with every module output.
        """
        scale = self.topology.data_size / weight  # DeepSpeed averages over the data-parallel ranks
        for index, batch in enumerate(batches):
            self.deepspeed.set_gradient_accumulation_boundary(index == len(batches) - 1)
            output = self.deepspeed(batch)
            self.deepspeed.backward(output.loss * scale, scale_wrt_gas=False)
            collect(output)

    def step(self, lr: float) -> StepResult:
        """Clip by the true global norm and update; a non-finite norm skips the update on every rank."""
        internals.wait_for_gradients(self.deepspeed)
        norm = global_norm(self.fragments, self.topology, self.config.engine.zero_stage == 0, self.device)
        if not torch.isfinite(norm):
            internals.skip_step(self.deepspeed)
            return StepResult(float(norm), skipped=True)
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = lr
        if internals.clips_itself(self.deepspeed):
            internals.replace_norm(self.deepspeed, norm)
        else:
            clip_gradients(self.fragments, norm, self.config.engine.gradient_clipping)
        self.deepspeed.step()
        return StepResult(float(norm), skipped=False)

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Any], collect: Callable[[Any], None]) -> None:
        """Forward only, without a graph."""
        self.deepspeed.eval()
        for batch in batches:
            collect(self.deepspeed(batch))
        self.deepspeed.train()

    def sum_over_data(self, values: Sequence[float]) -> list[float]:
        """Each value summed over the data-parallel ranks."""
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        if dist.is_initialized() and self.topology.data_size > 1:
            dist.all_reduce(tensor, group=self.topology.data_group)
        return tensor.tolist()

    def gather_over_data(self, value: Any) -> list[Any]:
        """The values of all data-parallel ranks, in their order; small plain Python values."""
        gathered = [value] * self.topology.data_size
        if dist.is_initialized() and self.topology.data_size > 1:
            dist.all_gather_object(gathered, value, group=self.topology.data_group)
        return gathered
