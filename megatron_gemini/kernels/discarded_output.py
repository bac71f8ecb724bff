"""Skips the last product when a recomputed output is discarded.

When recomputation runs a region once more, its nodes save what the backward needs. The region's output is what the
first run gave, and the next layer has long used it. So the node that ends a region leaves out its last product, and the
sum over tensor-parallel ranks behind it: a third of the arithmetic of a gated MLP.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch

_of_thread = threading.local()  # the backward on CUDA has threads of its own


@contextlib.contextmanager
def discard_output() -> Iterator[None]:
    """The output of the residual branch that runs inside is discarded: it may leave out its last product."""
    _of_thread.discarding = True
    try:
        yield
    finally:
        _of_thread.discarding = False


def output_is_discarded() -> bool:
    """For the nodes that end a residual branch, which then return a `discarded_output`."""
    return getattr(_of_thread, "discarding", False)


def discarded_output(like: torch.Tensor) -> torch.Tensor:
    """A tensor of the shape and dtype of `like`, for autograd to hang on to, with memory for one value."""
    return like.new_empty_strided(like.shape, [0] * like.dim())
