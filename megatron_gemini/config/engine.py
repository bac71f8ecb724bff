"""How the ranks divide the model, and what DeepSpeed is told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_gemini.config.check import at_least, one_of, positive


@dataclass(frozen=True)
class ParallelConfig:
    """How the ranks divide the decoder; what remains of the world is data parallel."""

    tensor: int = 1
    """Tensor-parallel ranks: query heads, MLP and vocabulary are sharded, K/V heads replicated."""
    sequence: bool = False
    """Also divide the tokens between the layers over the tensor-parallel ranks (sequence parallelism)."""
    context: int = 1
    """Context-parallel ranks: each holds a share of a row's tokens, for long rows."""
    pipeline: int = 1
    """Pipeline ranks: each holds some of the layers."""
    virtual_stages: int = 1
    """Pipeline stages of each rank."""
    schedule: Literal["1f1b", "interleaved", "breadth_first"] = "1f1b"
    """Order of the microbatches in a pipeline. 1f1b: fewest in flight, one stage a rank. interleaved: the same with
    virtual stages, a smaller bubble. breadth_first: all microbatches through one stage, then the next, so that ZeRO-3
    gathers a stage's parameters once a pass."""

    def __post_init__(self) -> None:
        positive(self, "parallel", "tensor", "context", "pipeline", "virtual_stages")
        one_of(self, "parallel", "schedule", ("1f1b", "interleaved", "breadth_first"))


@dataclass(frozen=True)
class EngineConfig:
    """What DeepSpeed is told."""

    precision: Literal["fp32", "bf16"] = "fp32"
    zero_stage: int = 3
    offload_optimizer: Literal["none", "cpu", "nvme"] = "cpu"
    offload_parameters: Literal["none", "cpu", "nvme"] = "none"
    nvme_path: str = ""
    """Folder on a local NVMe disk, for what is offloaded to nvme."""
    recompute: Literal["none", "selective", "full"] = "none"
    """What the backward computes again instead of keeping: nothing, the attention, or whole layers."""
    offload_activations: bool = False
    """Keep in host memory what recomputation has to keep."""
    gradient_clipping: float = 1.0
    """Bound of the global gradient norm; 0 does not clip."""
    deepspeed_config: str = ""
    """A DeepSpeed JSON of your own. What it and this file both determine must agree; "auto" is filled in."""
    adam: Literal["auto", "torch", "deepspeed"] = "auto"
    """auto: DeepSpeed's CPU Adam (compiled at first use) when the optimizer is offloaded from a GPU, else torch's
    fused AdamW."""

    def __post_init__(self) -> None:
        one_of(self, "engine", "precision", ("fp32", "bf16"))
        one_of(self, "engine", "offload_optimizer", ("none", "cpu", "nvme"))
        one_of(self, "engine", "offload_parameters", ("none", "cpu", "nvme"))
        one_of(self, "engine", "recompute", ("none", "selective", "full"))
        one_of(self, "engine", "adam", ("auto", "torch", "deepspeed"))
        if self.adam == "deepspeed" and self.offload_optimizer == "none":
            raise ValueError(
                "engine.adam deepspeed is its CPU Adam; set engine.offload_optimizer to cpu, or adam to auto"
            )
        if self.offload_activations and self.recompute == "none":
            raise ValueError(
                "engine.offload_activations is true but engine.recompute is none, which leaves nothing to offload; "
                "set engine.recompute to selective or full"
            )
        at_least(self, "engine", 0, "gradient_clipping")
        if self.zero_stage not in (0, 1, 2, 3):
            raise ValueError(f"engine.zero_stage is {self.zero_stage}; choose 0, 1, 2 or 3")
        # Rules of DeepSpeed, told here by the names of these settings and before it is imported.
        if self.offload_optimizer != "none" and self.zero_stage == 0:
            raise ValueError(
                "engine.offload_optimizer needs engine.zero_stage 1, 2 or 3, not 0; "
                "set engine.offload_optimizer to none or raise the stage"
            )
        nvme = "nvme" in (self.offload_optimizer, self.offload_parameters)
        if nvme and (self.zero_stage != 3 or not self.nvme_path):
            raise ValueError(
                "offload to nvme needs engine.zero_stage 3 and engine.nvme_path, a folder on a local disk; "
                f"they are {self.zero_stage} and {self.nvme_path!r}"
            )
        if self.offload_parameters != "none" and self.zero_stage != 3:
            raise ValueError(
                f"engine.offload_parameters needs engine.zero_stage 3, not {self.zero_stage}; "
                "set engine.offload_parameters to none or raise the stage"
            )
