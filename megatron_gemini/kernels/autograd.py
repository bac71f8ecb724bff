"""Types of what torch hands to the two halves of an autograd node."""

from __future__ import annotations

import torch
from torch.autograd.function import FunctionCtx

Gradients = tuple[torch.Tensor | None, ...]
"""What a backward returns: one for each argument of the forward, None where there is nothing to differentiate."""


class NodeContext(FunctionCtx):
    """The first argument of a node's forward and backward. A node names what it keeps there in a subclass of its own.

    Annotations only: torch makes the instances, of a class of its own. `saved_tensors` are those of
    `save_for_backward`; `needs_input_grad` says which arguments of the forward want a gradient.
    """

    saved_tensors: tuple[torch.Tensor, ...]
    needs_input_grad: tuple[bool, ...]
