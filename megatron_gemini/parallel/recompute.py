"""What the backward of the decoder's layers recomputes instead of keeping it (Chen et al., 2016).

A checkpointed region (a layer, or its attention) runs without a graph and keeps its input alone. The backward runs it
once more, with a graph. This recomputation skips the region's last product, since its output is discarded
(`kernels/discarded_output.py`). The gradients of the region's weights are accumulated by a backward of its own inside
the outer one: ZeRO's hooks see modules run and gradients arrive as ever. Layers have no dropout and no other state, so
recomputation gives the same bits, and its collectives come in the same order on every rank.

torch.utils.checkpoint has no place for host memory. Its form without reentrance also ends recomputation by an
exception, which leaves the hooks that DeepSpeed has put behind a module without a call.

Shape suffixes: S tokens of this rank's stream, D model width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias, TypeVarTuple

import torch
from torch.autograd.function import once_differentiable

from megatron_gemini.kernels.autograd import Gradients, NodeContext
from megatron_gemini.kernels.discarded_output import discard_output
from megatron_gemini.parallel.host_memory import OnHost

Region: TypeAlias = Callable[[torch.Tensor], torch.Tensor]
Rest = TypeVarTuple("Rest")
Mode: TypeAlias = Literal["none", "selective", "full"]


class Layer(Protocol[*Rest]):
    """A layer that runs its two halves by `attention` and `mlp` of the context that it is given."""

    def __call__(self, h_SD: torch.Tensor, /, *rest: *Rest, recompute: RecomputeContext = ...) -> torch.Tensor: ...


@dataclass(frozen=True)
class Recompute:
    """mode: full recomputes whole layers, selective their attention. offload: what is kept lies in host memory.

    Selective keeps the attention's input and no more. To keep the projected queries, keys and values as well would save
    their product, a twentieth of a Gemma layer's arithmetic, and keep more than twice as much.
    """

    mode: Mode = "none"
    offload: bool = False

    def begin(self) -> RecomputeContext:
        """The context of one forward through the layers."""
        # Without gradients, as in generation, nothing is kept anyway, and offloading would only copy.
        return RecomputeContext(self.mode if torch.is_grad_enabled() else "none", self.offload)


class RecomputeContext:
    """Runs the layers of one forward, in order, and says which of their parts are checkpointed regions.

    recomputing: this is the recomputation of a layer, whose output is discarded.
    """

    def __init__(self, mode: Mode, offload: bool = False, recomputing: bool = False) -> None:
        self.mode, self.offload, self.recomputing = mode, offload, recomputing
        self._newest: OnHost | None = None

    def layer(self, layer: Layer[*Rest], h_SD: torch.Tensor, *rest: *Rest) -> torch.Tensor:
        """layer(h_SD, *rest), as one region in mode full."""
        if self.mode != "full":
            return layer(h_SD, *rest, recompute=self)
        return self._checkpoint(lambda h: layer(h, *rest), lambda h: layer(h, *rest, recompute=RECOMPUTING), h_SD)

    def attention(
        self, attention: Callable[[torch.Tensor, *Rest], torch.Tensor], h_SD: torch.Tensor, *rest: *Rest
    ) -> torch.Tensor:
        """attention(h_SD, *rest), as a region of its own in mode selective."""
        if self.mode != "selective":
            return attention(h_SD, *rest)
        return self._checkpoint(lambda h: attention(h, *rest), lambda h: _without_output(attention, h, *rest), h_SD)

    def mlp(self, mlp: Region, h_SD: torch.Tensor) -> torch.Tensor:
        """mlp(h_SD), which ends a layer: the one output of it that nobody reads when the layer is recomputed."""
        return _without_output(mlp, h_SD) if self.recomputing else mlp(h_SD)

    def _checkpoint(self, run: Region, recompute: Region, h_SD: torch.Tensor) -> torch.Tensor:
        if not h_SD.requires_grad:  # the region's weights may want gradients all the same
            h_SD = h_SD.detach().requires_grad_()
        if self.offload:  # a chain over all regions of a forward, so that each is fetched while the one after it runs
            self._newest = OnHost(h_SD, self._newest)
        return _Checkpoint.apply(h_SD, run, recompute, self._newest)


NO_RECOMPUTE, RECOMPUTING = RecomputeContext("none"), RecomputeContext("none", recomputing=True)
"""The context of a layer by itself, and that of a layer's recomputation."""


def _without_output(region: Callable[[*Rest], torch.Tensor], *arguments: *Rest) -> torch.Tensor:
    """Runs the region for what its nodes save; its output is a stand-in."""
    with discard_output():
        return region(*arguments)


class _CheckpointContext(NodeContext):
    recompute: Region
    host: OnHost | None


class _Checkpoint(torch.autograd.Function):
    """run(h), of which h alone is kept, on the device or on `host`; the backward is that of recompute(h)."""

    @staticmethod
    def forward(
        ctx: _CheckpointContext, h: torch.Tensor, run: Region, recompute: Region, host: OnHost | None
    ) -> torch.Tensor:
        ctx.recompute, ctx.host = recompute, host
        if host is None:
            ctx.save_for_backward(h)
        return run(h)

    @staticmethod
    # Another backward runs inside, which leaves no graph of what it has computed.
    @once_differentiable
    def backward(ctx: _CheckpointContext, *grads: torch.Tensor) -> Gradients:
        # Detached: the graph of the recomputation ends here, and the outer backward goes on from h's gradient.
        h = (ctx.saved_tensors[0] if ctx.host is None else ctx.host.take()).detach().requires_grad_()
        with torch.enable_grad():
            out = ctx.recompute(h)
        torch.autograd.backward(out, grads[0])
        return h.grad, None, None, None
