"""What the backward of the decoder's layers computes again instead of keeping it (Chen et al., 2016).

A region (a layer, or its attention) runs without a graph and keeps its input alone. In the backward it runs once more,
with a graph. It skips its last product, since a recomputed output is discarded (`kernels/discarded_output.py`). The
gradients of its
weights are accumulated by a backward of its own inside the outer one: ZeRO's hooks see modules run and gradients arrive
as ever. Layers have no dropout and no other state, so the second run gives the same bits, and its collectives come in
the same order on every rank.

Shape suffixes: S tokens of this rank's stream, D model width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.autograd.function import once_differentiable

from megatron_gemini.kernels.discarded_output import discard_output
from megatron_gemini.parallel.host_memory import OnHost

Region = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Recompute:
    """mode: full computes whole layers again, selective their attention. offload: what is kept lies in host memory.

    Selective keeps the attention's input and no more. To keep the projected queries, keys and values as well would save
    their product, a twentieth of a Gemma layer's arithmetic, and keep more than twice as much.
    """

    mode: Literal["none", "selective", "full"] = "none"
    offload: bool = False

    def begin(self) -> RecomputeContext:
        """One forward through the layers. Without gradients, as in generation, nothing is kept anyway."""
        return RecomputeContext(self.mode if torch.is_grad_enabled() else "none", self.offload)


class RecomputeContext:
    """Runs the layers of one forward, in order."""

    def __init__(self, mode: str, offload: bool = False) -> None:
        self.mode, self.offload = mode, offload
        self._newest: OnHost | None = None

    def layer(self, layer: Region, h_SD: torch.Tensor, *rest: Any) -> torch.Tensor:
        """layer(h_SD, *rest), which runs its halves by `attention` and `mlp` of the pass that it is given as `run`."""
        if self.mode == "full":
            return self._recomputed(lambda h: layer(h, *rest), lambda h: layer(h, *rest, run=RECOMPUTING), h_SD)
        return layer(h_SD, *rest, run=self)

    def attention(self, attention: Region, h_SD: torch.Tensor, *rest: Any) -> torch.Tensor:
        """attention(h_SD, *rest)"""
        if self.mode == "selective":
            return self._recomputed(lambda h: attention(h, *rest), lambda h: _discarding(attention, h, *rest), h_SD)
        return attention(h_SD, *rest)

    def mlp(self, mlp: Region, h_SD: torch.Tensor) -> torch.Tensor:
        """mlp(h_SD), the end of a layer."""
        return _discarding(mlp, h_SD) if self.mode == "recomputing" else mlp(h_SD)

    def _recomputed(self, first: Region, second: Region, h_SD: torch.Tensor) -> torch.Tensor:
        if not h_SD.requires_grad:  # the region's weights may want gradients all the same
            h_SD = h_SD.detach().requires_grad_()
        if self.offload:
            self._newest = OnHost(h_SD, self._newest)
        return _Recomputed.apply(h_SD, first, second, self._newest)


PLAIN, RECOMPUTING = RecomputeContext("none"), RecomputeContext("recomputing")
"""Computes nothing again; is the second run of a layer."""


def _discarding(region: Region, *arguments: Any) -> torch.Tensor:
    with discard_output():
        return region(*arguments)


class _Recomputed(torch.autograd.Function):
    """first(h), whose backward has kept h alone, or takes it from `host`, and is that of second(h)."""

    @staticmethod
    def forward(ctx: Any, h: torch.Tensor, first: Region, second: Region, host: OnHost | None) -> torch.Tensor:
        ctx.second, ctx.host = second, host
        if host is None:
            ctx.save_for_backward(h)
        return first(h)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        h = (ctx.saved_tensors[0] if ctx.host is None else ctx.host.take()).detach().requires_grad_()
        with torch.enable_grad():
            out = ctx.second(h)
        torch.autograd.backward(out, grads[0])
        return h.grad, None, None, None
