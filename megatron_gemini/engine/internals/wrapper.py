"""What DeepSpeed has put around the optimizer, the same to see and to do at every ZeRO stage.

DeepSpeed has five kinds of it, see `kinds`. What stands here is right for the plainest: torch's own optimizer.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch

from megatron_gemini.engine.internals.fragments import MOMENTS, Fragment
from megatron_gemini.engine.internals.release import Use
from megatron_gemini.engine.internals.types import DeepSpeedEngine


class OptimizerWrapper:
    """The optimizer of an engine whose weights, moments and gradients lie where its ZeRO stage keeps them.

    basic: the optimizer below, of torch or DeepSpeed's CPU Adam.
    fragments: the pieces that this rank owns, in the order of the module's parameters, or such that those of one
        group come together. Frozen parameters are left out.
    """

    fragments: list[Fragment]
    listed: ClassVar[type | None] = None
    """Lists what is touched of DeepSpeed's wrapper."""

    def __init__(self, engine: DeepSpeedEngine, basic: torch.optim.Optimizer) -> None:
        self.engine, self.basic = engine, basic
        self.trained = [(name, p) for name, p in engine.module.named_parameters() if p.requires_grad]

    @classmethod
    def uses(cls, engine: DeepSpeedEngine) -> Iterator[Use]:
        """The objects of DeepSpeed that this class touches, in an order in which each can be found."""
        yield Use(engine, DeepSpeedEngine)
        if cls.listed is not None:
            yield Use(engine.optimizer, cls.listed)

    # The state of the optimizer, for checkpoints.

    def masters(self) -> list[torch.Tensor]:
        """The tensors that the optimizer steps on this rank."""
        return [master for group in self.basic.param_groups for master in group["params"]]

    def ensure_moments(self) -> None:
        """Make Adam's moments exist (zeros), as a resume needs before it fills them."""
        for number, master in enumerate(self.masters()):
            self.bring_in(number, state=True)
            for key in MOMENTS:
                if key not in self.basic.state[master]:
                    self.basic.state[master][key] = torch.zeros_like(master.data)
        self.put_back()

    def has_moments(self) -> bool:
        """Whether a first step has made Adam's moments."""
        return all(MOMENTS[0] in self.basic.state.get(master, {}) for master in self.masters())

    def set_step_count(self, steps: int) -> None:
        """Set Adam's count of updates wherever moments exist.

        Some wrappers make the moments by a step on zero gradients when they are built, which counts as one.
        """
        for master in self.masters():
            if state := self.basic.state.get(master):
                # torch's fused AdamW counts in a tensor beside the weights, DeepSpeed's CPU Adam in an integer.
                as_tensor = isinstance(self.basic, torch.optim.AdamW)
                state["step"] = torch.tensor(float(steps), device=master.device) if as_tensor else steps

    def publish_masters(self) -> None:
        """Copy the master weights into the weights that the forward reads, on every rank."""

    # What lies on a disk: nothing, but for one kind.

    def bring_in(self, group: int, *, state: bool = False, gradients: bool = False) -> None:
        """Bring a group into memory, and the one before out. state, gradients: what is changed, and to be kept."""

    def put_back(self) -> None:
        """Write what lies on disk back to it; views of fragments are void from then on."""

    # A step.

    def wait(self) -> None:
        """Block until DeepSpeed's asynchronous reductions and copies to the host have finished."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def keep_accumulating(self) -> None:
        """After a backward: the next one adds to its gradients, also if no forward comes between.

        DeepSpeed counts backwards at the forward that follows. In a pipeline several forwards come first and then as
        many backwards, each of which would otherwise overwrite the gradients of the one before.
        """

    def tell_norm(self, norm: torch.Tensor) -> bool:
        """Let the next step clip by `norm`, which must be finite, in place of DeepSpeed's own figure.

        Returns False where DeepSpeed has no seam for it: the caller clips, and DeepSpeed has been stopped from it.
        """
        return False

    def skip(self) -> None:
        """Drop the gradients of this step."""
        self.engine.zero_grad()
