"""What one DeepSpeed engine keeps: weights, gradients and optimizer state at every ZeRO stage.

Counted from what deepspeed 0.19 allocates, which is not what the paper's 16 bytes a parameter would say:

- Training in bf16 sums gradients in float32.
- ZeRO-1 keeps whole gradients until the step ends, also when the optimizer is offloaded.
- An offloaded optimizer takes gradients in buffers of its own on the host.

The engine's flat buffers are padded by less than the number of ranks, which is not counted.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_gemini.engine.settings import LIVE
from megatron_gemini.planning.footprint import Bytes, Footprint

FP32 = 4
BUCKET = 50_000_000
"""Elements of gradients reduced at once, and of weights fetched ahead; `deepspeed_settings` tells DeepSpeed so."""
ALLREDUCE = 500_000_000
"""Elements that DeepSpeed flattens for one all-reduce where ZeRO does not reduce (ZeRO-0, and ZeRO-1 in bf16)."""


@dataclass(frozen=True)
class ZeroPlan:
    """How an engine divides and offloads. ranks: those over which ZeRO divides; bf16: otherwise fp32 throughout."""

    stage: int
    ranks: int
    bf16: bool
    offload_optimizer: bool = False
    offload_parameters: bool = False

    @property
    def gathers(self) -> bool:
        """Whether weights are gathered before use: one rank alone has them whole, unless they are offloaded."""
        return self.stage == 3 and (self.ranks > 1 or self.offload_parameters)

    @property
    def element(self) -> int:
        """Bytes of a weight or an activation."""
        return 2 if self.bf16 else FP32


def zero_state(parameters: int, largest: int, plan: ZeroPlan) -> Footprint:
    """The state of an engine of `parameters` elements, the largest tensor among them having `largest`.

    As it is between two microbatches of a step. What is there for a moment (`zero_buffers`) is not in it.
    """
    share = parameters / plan.ranks
    optimizer = share * FP32 * 3  # a float32 master of the weights, and two moments
    if plan.stage == 3:
        weights = Bytes(weights=share * plan.element)
        here, there = (Bytes(), weights) if plan.offload_parameters else (weights, Bytes())
        if plan.offload_optimizer:  # the sum over microbatches, and the optimizer's copy of it
            return Footprint(here, there + Bytes(gradients=2 * share * FP32, optimizer=optimizer))
        return Footprint(here + Bytes(gradients=share * FP32, optimizer=optimizer), there)
    weights_here = parameters * plan.element
    if plan.stage == 0:
        # In bf16 a float32 master and two moments, in fp32 the moments only: the weights are their own master.
        masters = parameters * FP32 * (3 if plan.bf16 else 2)
        return Footprint(Bytes(weights_here, parameters * plan.element, masters))
    gradients = parameters * FP32 if plan.stage == 1 else share * FP32
    if not plan.offload_optimizer:
        if plan.bf16 and plan.stage == 1:
            gradients += parameters * plan.element  # what autograd wrote stays beside the float32 sum
        return Footprint(Bytes(weights_here, gradients, optimizer))
    gradients_there = share * FP32
    if plan.stage == 2 and not plan.bf16:
        gradients, gradients_there = 0.0, 2 * gradients_there  # fp32 sums on the host
    staging = largest * plan.element  # of the largest gradient on its way to the host, on either side
    return Footprint(
        Bytes(weights_here, gradients, buffers=staging),
        Bytes(gradients=gradients_there, optimizer=optimizer, buffers=share * plan.element + staging),
    )


def frozen_state(parameters: int, plan: ZeroPlan) -> Footprint:
    """The state of an engine that is not trained: weights alone, which ZeRO-3 divides and the other stages do not."""
    weights = Bytes(weights=parameters * plan.element / (plan.ranks if plan.stage == 3 else 1))
    return Footprint(host=weights) if plan.offload_parameters else Footprint(weights)


def zero_buffers(parameters: int, largest: int, plan: ZeroPlan, held: int | None = None, bucket: int = BUCKET) -> float:
    """Bytes on the GPU while forwards and backwards run: buckets of gradients, and weights that ZeRO-3 has gathered.

    held: elements that a schedule keeps gathered at once, instead of ZeRO-3's own choice. bucket: elements of a bucket;
    DeepSpeed allocates a whole one, however small the model is.
    """
    if plan.stage < 2:
        return 0.0  # both reduce after the last backward, see `update_buffers`
    if plan.stage == 2:
        return min(parameters, max(bucket, largest)) * plan.element
    gathered = min(parameters, max(LIVE, 2 * largest) + bucket) if held is None else held
    gathered = gathered if plan.gathers else 0  # one rank alone holds its weights whole and gathers nothing
    return (max(bucket, largest) + gathered) * plan.element


def update_buffers(parameters: int, largest: int, plan: ZeroPlan) -> float:
    """Bytes on the GPU after the last backward: gradients on their way through the reduction, or to the optimizer."""
    if plan.stage >= 2:
        return 0.0
    if plan.stage == 1 and (plan.offload_optimizer or not plan.bf16):
        share = parameters / plan.ranks * FP32  # this rank's part, made before the whole gradients go
        return min(parameters, max(BUCKET, largest)) * FP32 + share
    flattened = min(parameters, ALLREDUCE) * (FP32 if plan.stage else plan.element)
    return max(flattened, parameters * FP32 if plan.stage == 0 and plan.bf16 else 0)  # float32 for the update
