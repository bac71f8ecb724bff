"""What the backward of the decoder's layers computes again instead of keeping it (Chen et al., 2016).

A region (a layer, or its attention) runs without a graph, keeps its input alone, and in the backward runs once more
with one. The gradients of its weights are accumulated by a backward of its own inside the outer one, so that ZeRO's
hooks see every module run and every gradient arrive as they do without recomputation. torch's checkpoint without
reentrance does not do: it restores tensors one by one under the hooks of the module that wants them, and the hooks of
the modules that run again release ZeRO-3's weights in between. Layers have no dropout and no other state, so the second
run gives the same bits, and its collectives come in the same order on every rank.

Shape suffixes: S tokens of this rank's stream, D model width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.autograd.function import once_differentiable

from megatron_gemini.parallel.host_memory import OnHost

Region = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Recompute:
    """mode: full computes whole layers again, selective their attention. offload: what is kept lies in host memory.

    Selective keeps the attention's input and no more. To keep the projected queries, keys and values as well would save
    their product, a twentieth of a layer of Gemma's shape, for up to three times the memory.
    """

    mode: Literal["none", "selective", "full"] = "none"
    offload: bool = False

    def begin(self) -> Pass:
        """One forward through the layers. Without gradients, as in generation, nothing is kept anyway."""
        return Pass(self.mode if torch.is_grad_enabled() else "none", self.offload)


class Pass:
    """Runs the layers of one forward, in order."""

    def __init__(self, mode: str, offload: bool = False) -> None:
        self.mode, self.offload = mode, offload
        self._newest: OnHost | None = None

    def layer(self, layer: Region, h_SD: torch.Tensor, *rest: Any) -> torch.Tensor:
        """layer(h_SD, *rest), which is told of this pass unless it is computed again as a whole."""
        return self._again(layer, h_SD, rest) if self.mode == "full" else layer(h_SD, *rest, run=self)

    def attention(self, attention: Region, h_SD: torch.Tensor, *rest: Any) -> torch.Tensor:
        """attention(h_SD, *rest)"""
        return self._again(attention, h_SD, rest) if self.mode == "selective" else attention(h_SD, *rest)

    def _again(self, region: Region, h_SD: torch.Tensor, rest: tuple) -> torch.Tensor:
        if not h_SD.requires_grad:  # the region's weights may want gradients all the same
            h_SD = h_SD.detach().requires_grad_()
        if self.offload:
            self._newest = OnHost(h_SD, self._newest)
        return _Again.apply(h_SD, region, rest, self._newest)


PLAIN = Pass("none")
"""Computes nothing again."""


class _Again(torch.autograd.Function):
    """region(h, *rest), of which the backward keeps h, or takes it from `host`; `rest` gets no gradient."""

    @staticmethod
    def forward(ctx: Any, h: torch.Tensor, region: Region, rest: tuple, host: OnHost | None) -> torch.Tensor:
        ctx.region, ctx.rest, ctx.host = region, rest, host
        if host is None:
            ctx.save_for_backward(h)
        return region(h, *rest)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        h = (ctx.saved_tensors[0] if ctx.host is None else ctx.host.take()).detach().requires_grad_()
        with torch.enable_grad():
            out = ctx.region(h, *ctx.rest)
        torch.autograd.backward(out, grads[0])
        return h.grad, None, None, None
