"""Parameters of the layers that encoders are made of, by formula."""

from __future__ import annotations


def linear(inputs: int, outputs: int, bias: bool = True) -> int:
    return inputs * outputs + (outputs if bias else 0)


def feed_forward(width: int, inner: int) -> int:
    """With the norm before it."""
    return 2 * width + linear(width, inner) + linear(inner, width)


def attention(width: int) -> int:
    """With the norm before it."""
    return 2 * width + linear(width, 3 * width) + linear(width, width)
