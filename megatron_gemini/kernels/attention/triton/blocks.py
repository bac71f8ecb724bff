"""What the attention kernels share: blocks of rows from memory, and block edges.

Shape suffixes: H head width.
"""

# ruff: noqa: RET505 -- Triton drops the dead branch of a constant condition, but not what follows a return

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def to_block(position, BLOCK: tl.constexpr):
    """The block's edge at or before a position."""
    return position // BLOCK * BLOCK


@triton.jit
def up_to_block(position, BLOCK: tl.constexpr):
    """The block's edge at or behind a position."""
    return (position + BLOCK - 1) // BLOCK * BLOCK


@triton.jit
def head_source(
    ptr,
    tokens,
    token_stride,
    heads,
    head_stride,
    H: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    TMA: tl.constexpr,
):
    """What `load_heads` reads [tokens, heads, H] from: a descriptor for the tensor memory accelerator, or the pointer.

    TMA: GROUP, the heads that lie side by side in a block, is a power of two.
    """
    if TMA:
        shape: tl.constexpr = [max(BLOCK // GROUP, 1), min(GROUP, BLOCK), WIDTH]
        return tl.make_tensor_descriptor(ptr, [tokens, heads, H], [token_stride, head_stride, 1], shape)
    else:
        return ptr


@triton.jit
def load_heads(
    source,
    first,
    first_head,
    token_stride,
    head_stride,
    tokens,
    H: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    TMA: tl.constexpr,
    CHECKED: tl.constexpr,
):
    """[BLOCK, WIDTH]: rows (token, head), the GROUP heads from `first_head` on side by side, from row `first`.

    0 beyond H and, if CHECKED, beyond the last token.
    """
    if TMA:
        # It fills what lies outside the tensor with zeros itself, so that nothing is left to check.
        block = source.load([first // GROUP, first_head + first % GROUP, 0])
        return block.reshape([BLOCK, WIDTH])
    else:
        row = first + tl.arange(0, BLOCK)
        token, head = row // GROUP, first_head + row % GROUP
        column = tl.arange(0, WIDTH)
        place = token.to(tl.int64) * token_stride + head * head_stride
        place = source + place[:, None] + column[None, :]
        if CHECKED:
            return tl.load(place, mask=(token < tokens)[:, None] & (column < H)[None, :], other=0.0)
        elif H == WIDTH:
            return tl.load(place)
        else:
            return tl.load(place, mask=(column < H)[None, :], other=0.0)


@triton.jit
def product(a, b, acc=None, PRECISION: tl.constexpr = "tf32"):
    """a b + acc in float32.

    "tf32x3": float32 inputs, each product as three of tensor cores, right to about 1e-6. "tf32": 16-bit inputs.
    "ieee": for the interpreter, whose own product of bfloat16 is wrong; 16-bit inputs keep their rounding.
    """
    if PRECISION == "ieee":
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)
