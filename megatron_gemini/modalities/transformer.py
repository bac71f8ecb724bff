"""The bidirectional pre-norm transformer of the encoders and the image code tokenizer, on packed rows.

Shape suffixes: X rows of all items back to back, D width, N heads, H head width.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from megatron_gemini.kernels.attention.api import AttentionPlan, attention
from megatron_gemini.parallel.parameters import Init, constant, declare, normal, zeros

EPS = 1e-6  # of the norms, as in SigLIP


def declare_layer(layer: nn.Module, weight: Init) -> None:
    """Declare that a layer of torch's begins with `weight`, and its bias, if any, with zeros.

    To be called in the constructor of a subclass, see `declare`.
    """
    for name, parameter in layer.named_parameters():
        declare(parameter, weight if name == "weight" else zeros())


class _DeclaredLinear(nn.Linear):
    def __init__(self, inputs: int, outputs: int, bias: bool, weight: Init) -> None:
        super().__init__(inputs, outputs, bias=bias)
        declare_layer(self, weight)


class _LayerNorm(nn.LayerNorm):
    def __init__(self, width: int) -> None:
        super().__init__(width, eps=EPS)
        declare_layer(self, constant(1.0))


def linear(inputs: int, outputs: int, *, bias: bool = True, gain: float = 1.0) -> nn.Linear:
    """A linear layer that begins with weights of deviation gain / sqrt(inputs)."""
    return _DeclaredLinear(inputs, outputs, bias, normal(gain / math.sqrt(inputs)))


def layer_norm(width: int) -> nn.LayerNorm:
    return _LayerNorm(width)


class SelfAttention(nn.Module):
    """Multi-head attention within the segments of a packed row."""

    def __init__(self, width: int, heads: int, gain: float = 1.0) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = linear(width, 3 * width)
        self.out = linear(width, width, gain=gain)

    def forward(self, x_XD: torch.Tensor, plan: AttentionPlan) -> torch.Tensor:
        rows, width = x_XD.shape
        q_XNH, k_XNH, v_XNH = self.qkv(x_XD).view(rows, 3, self.heads, width // self.heads).unbind(1)
        return self.out(attention(q_XNH, k_XNH, v_XNH, plan).reshape(rows, width))


class FeedForward(nn.Module):
    """Two linear layers around an activation."""

    def __init__(self, width: int, mlp_width: int, activation: nn.Module, gain: float = 1.0) -> None:
        super().__init__()
        self.up = linear(width, mlp_width)
        self.activation = activation
        self.down = linear(mlp_width, width, gain=gain)

    def forward(self, x_XD: torch.Tensor) -> torch.Tensor:
        return self.down(self.activation(self.up(x_XD)))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)): the ViT's block, with the tanh form of GELU as in SigLIP."""

    def __init__(self, width: int, heads: int, mlp_width: int, gain: float = 1.0) -> None:
        super().__init__()
        self.attention_norm = layer_norm(width)
        self.attention = SelfAttention(width, heads, gain)
        self.mlp_norm = layer_norm(width)
        self.mlp = FeedForward(width, mlp_width, nn.GELU("tanh"), gain)

    def forward(self, x_XD: torch.Tensor, plan: AttentionPlan) -> torch.Tensor:
        x_XD = x_XD + self.attention(self.attention_norm(x_XD), plan)
        return x_XD + self.mlp(self.mlp_norm(x_XD))


class Transformer(nn.Module):
    """`layers` blocks and a final norm. Residual branches begin smaller the more of them there are (GPT-2)."""

    def __init__(self, width: int, layers: int, heads: int, mlp_width: int) -> None:
        super().__init__()
        # Two residual branches a block: all together begin with the variance of one without the gain.
        gain = 1.0 / math.sqrt(2 * layers)
        self.blocks = nn.ModuleList(Block(width, heads, mlp_width, gain) for _ in range(layers))
        self.norm = layer_norm(width)

    def forward(self, x_XD: torch.Tensor, plan: AttentionPlan) -> torch.Tensor:
        for block in self.blocks:
            x_XD = block(x_XD, plan)
        return self.norm(x_XD)


def sinusoids(position_X: torch.Tensor, width: int) -> torch.Tensor:
    """float32[X, width] of int or float positions: width/2 sines, then as many cosines, of periods 2 pi to 20,000 pi.

    (Vaswani et al. 2017, section 3.5.) Defined for every position, so no grid or length needs interpolation.
    """
    half = width // 2
    frequency = torch.exp(torch.arange(half, device=position_X.device).double() * (-math.log(10_000.0) / half))
    # In float64: an angle in float32 is off by a multiple of the position, and bfloat16 rounds those above 256.
    angle = position_X.double()[:, None] * frequency
    # An odd width ends in a column of zeros.
    return torch.cat([angle.sin(), angle.cos(), angle.new_zeros(len(angle), width % 2)], dim=-1).float()


def grid_positions(row_X: torch.Tensor, column_X: torch.Tensor, width: int) -> torch.Tensor:
    """float32[X, width]: half of the width says the patch's row, half its column."""
    return torch.cat([sinusoids(row_X, width // 2), sinusoids(column_X, width // 2)], dim=-1)
