"""RMSNorm (Zhang and Sennrich, 2019) with the scale 1 + weight, as in Gemma. Shape suffix: D width."""

from __future__ import annotations

from functools import lru_cache

import torch

from megatron_gemini.kernels.autograd import Gradients, NodeContext


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [..., D] / sqrt(mean(x^2) + eps) * (1 + weight [D]), in float32, returned in x's dtype.

    One autograd node with a backward of its own.
    """
    # On CPU it takes half the time of the composite at T=256, D=256, and a fifth at T=1024, D=128, where the composite
    # reduces the weight's gradient slowly. Compiled code takes 0.76 of it at the first size, where this takes 0.5 to
    # 0.68, and 0.35 at T=2048, D=1024, where this takes 0.41 (docs/performance.md).
    return _RMSNorm.apply(x, weight, eps)


@lru_cache(maxsize=64)
def _scalar(value: float, device: torch.device) -> torch.Tensor:
    """Adding a 0-dimensional tensor takes half the time of adding a Python number, which torch wraps at every call."""
    return torch.tensor(value, device=device)


def norm_forward(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(y in x's dtype, i [..., 1], s [D]) with y = x i s, i = (mean(x^2) + eps)^-1/2 and s = 1 + weight.

    The last two are for `norm_backward`.
    """
    length = torch.linalg.vector_norm(x, 2, -1, True, dtype=torch.float32)
    inverse = torch.addcmul(_scalar(eps, x.device), length, length, value=1 / x.shape[-1]).rsqrt_()
    scale = weight.float() + _scalar(1.0, x.device)
    normed = (x * inverse).mul_(scale)
    return normed if x.dtype == torch.float32 else normed.to(x.dtype), inverse, scale


def norm_backward(
    grad: torch.Tensor, x: torch.Tensor, inverse: torch.Tensor, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(x's gradient i (g s - x i^2 mean(g s x)), the weight's gradient sum(g x i) over rows), in x's dtype."""
    width = x.shape[-1]
    # Sums over rows as matrix-vector products: their reduction is what makes the composite slow.
    product = grad * x if x.dtype == torch.float32 else grad.float() * x
    rows = product.view(-1, width)
    weight_grad = torch.mv(rows.t(), inverse.view(-1))
    along = torch.mv(rows, scale).view(inverse.shape).mul_(inverse.square())
    x_grad = torch.mul(grad, scale, out=product)  # in its memory: a large new tensor costs as much as the arithmetic
    x_grad.addcmul_(x, along, value=-1 / width).mul_(inverse)
    return (x_grad, weight_grad) if x.dtype == torch.float32 else (x_grad.to(x.dtype), weight_grad.to(x.dtype))


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: NodeContext, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        normed, inverse, scale = norm_forward(x, weight, eps)
        ctx.save_for_backward(x, inverse, scale)
        return normed

    @staticmethod
    def backward(ctx: NodeContext, *grads: torch.Tensor) -> Gradients:
        return *norm_backward(grads[0], *ctx.saved_tensors), None
