"""Numbers that specs of encoders share: parameters of the layers that they are made of, and sizes to measure."""

from __future__ import annotations


def linear(inputs: int, outputs: int, bias: bool = True) -> int:
    return inputs * outputs + (outputs if bias else 0)


def feed_forward(width: int, inner: int) -> int:
    """With the norm before it."""
    return 2 * width + linear(width, inner) + linear(inner, width)


def spread(largest: int, count: int) -> list[int]:
    """About `count` whole numbers, evenly from 1 / count of the largest up to it."""
    return sorted({max(1, round(largest * step / count)) for step in range(1, count + 1)})


def attention(width: int) -> int:
    """With the norm before it."""
    return 2 * width + linear(width, 3 * width) + linear(width, width)
