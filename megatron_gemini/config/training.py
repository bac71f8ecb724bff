"""The run: optimizer, schedule, loop and logs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_gemini.config.check import at_least, one_of, positive


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW; no weight decay on norms, biases and embeddings."""

    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1

    def __post_init__(self) -> None:
        positive(self, "optimizer", "lr", "eps")
        at_least(self, "optimizer", 0, "weight_decay", "beta1", "beta2")
        # A beta of 1 would keep the moments at their zeros for ever.
        for name in ("beta1", "beta2"):
            if getattr(self, name) >= 1:
                raise ValueError(f"optimizer.{name} is {getattr(self, name)}; it must be below 1")


@dataclass(frozen=True)
class ScheduleConfig:
    """Learning rate over the steps: linear warm-up, then the named shape down to `final_ratio`."""

    kind: Literal["cosine", "linear", "wsd"] = "cosine"
    """wsd: warm-up, stable, then a linear decay over the last `decay_steps`."""
    warmup_steps: int = 20
    decay_steps: int = 100
    final_ratio: float = 0.1

    def __post_init__(self) -> None:
        one_of(self, "schedule", "kind", ("cosine", "linear", "wsd"))
        at_least(self, "schedule", 0, "warmup_steps", "decay_steps", "final_ratio")
        # All three kinds end at it: above 1 the rate would rise at the end, which is no schedule of these.
        if self.final_ratio > 1:
            raise ValueError(f"schedule.final_ratio is {self.final_ratio}; it is a share of optimizer.lr, at most 1")


@dataclass(frozen=True)
class TrainConfig:
    """The loop."""

    output_dir: str = "runs/default"
    steps: int = 100
    rows_per_step: int = 2
    """Packed rows of a global step over all data-parallel ranks; each rank's share is its microbatches."""
    seed: int = 0
    save_every: int = 0
    """Steps between checkpoints; 0 saves only at the end (and when stopped)."""
    keep: int = 2
    """Checkpoints of this run that are kept; older ones are deleted, those of another run in the folder are not."""
    keep_every: int = 0
    """Checkpoints whose step is a multiple of it are kept for ever; 0 none."""
    validation_every: int = 0
    """Steps between validation losses; 0 never."""
    validation_rows: int = 8
    max_skipped_steps: int = 5
    """So many steps in a row that change no weight end the run, with exit status 3. A step is skipped where the
    gradient norm is not finite or no token has a loss weight."""
    rank_timeout: float = 600.0
    """Seconds after which a rank that gives no sign of life is named and the run ends, with exit status 4; 0 never."""
    resume: bool = True
    """Go on from the checkpoint in output_dir that was saved last, if there is one."""
    image_tokenizer: str = ""
    """Checkpoint of the image tokenizer whose codes the shards hold; copied into every checkpoint."""

    def __post_init__(self) -> None:
        # keep is above 0: the newest checkpoint is what a stopped run goes on from.
        positive(self, "train", "steps", "rows_per_step", "keep", "validation_rows", "max_skipped_steps")
        at_least(self, "train", 0, "save_every", "keep_every", "validation_every", "seed", "rank_timeout")


@dataclass(frozen=True)
class LoggingConfig:
    """What is written while training."""

    every: int = 1
    """Steps between metric records."""
    tensorboard: bool = True
    wandb_project: str = ""
    """Weights & Biases project; empty does not use it."""

    def __post_init__(self) -> None:
        positive(self, "logging", "every")
