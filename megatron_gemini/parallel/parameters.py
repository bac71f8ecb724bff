"""What every parameter declares about itself, and initial values that do not depend on the layout of ranks.

A parameter carries two attributes. `placement` says which part of the global tensor this rank holds; `init` says
how it begins. Checkpoints, gradient norms and initialization read only these, never the layer that made them.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn

from megatron_gemini.parallel.collectives import TensorRanks
from megatron_gemini.parallel.random_numbers import normal_at


@dataclass(frozen=True)
class Placement:
    """Where this rank's part lies in the global tensor.

    sharded_dim: the dimension divided over the tensor-parallel ranks; None: every rank holds the whole tensor.
    global_shape: shape of the global tensor, without the rows that pad the vocabulary.
    start: where along `sharded_dim` this rank's part begins.
    partial: every rank holds the whole tensor but computes only a partial gradient, from its tokens or heads;
        the engine sums them over the tensor-parallel ranks once a step.
    tied: another pipeline stage holds the same weight; the engine sums the gradients of both once a step.
    copy: this is the second of the two, which counts neither in the norm nor in checkpoints.
    """

    sharded_dim: int | None
    global_shape: tuple[int, ...]
    start: int = 0
    partial: bool = False
    tied: bool = False
    copy: bool = False

    def kept(self, local: int) -> int:
        """How many of `local` indices along `sharded_dim` are in the global tensor; the rest is padding."""
        assert self.sharded_dim is not None
        return max(0, min(local, self.global_shape[self.sharded_dim] - self.start))


@dataclass(frozen=True)
class Init:
    """Initial values: normal with mean 0 and deviation `std`, or `value` everywhere if `std` is 0."""

    std: float = 0.0
    value: float = 0.0


def normal(std: float) -> Init:
    return Init(std=std)


def constant(value: float) -> Init:
    return Init(value=value)


def zeros() -> Init:
    return Init()


class _DeclaredParameter(nn.Parameter):
    """The type of a declared parameter, for the checker: it is a plain nn.Parameter with two attributes."""

    init: Init
    placement: Placement


def declare(parameter: nn.Parameter, init: Init, placement: Placement | None = None) -> nn.Parameter:
    """Attach `init` and `placement` (whole on every rank if None) to a parameter; returns it.

    Without a placement it must be called in the constructor of the parameter's module: as soon as that returns, ZeRO-3
    partitions the parameter, which is empty from then on.
    """
    declared = cast(_DeclaredParameter, parameter)
    declared.init = init
    declared.placement = placement or Placement(None, tuple(parameter.shape))
    return parameter


def declare_tied(parameter: nn.Parameter, *, copy: bool) -> None:
    """Say that another pipeline stage holds this weight too; copy: that one is the original."""
    declared = cast(_DeclaredParameter, parameter)
    declared.placement = dataclasses.replace(declared.placement, tied=True, copy=copy)


def new_parameter(*shape: int, init: Init, placement: Placement | None = None) -> nn.Parameter:
    """A declared parameter with undefined values, on the current default device and in the default dtype."""
    return declare(nn.Parameter(torch.empty(*shape)), init, placement)


def new_sharded_parameter(ranks: TensorRanks, dim: int, *shape: int, init: Init) -> nn.Parameter:
    """`new_parameter` with this rank's share of dimension `dim` of the global `shape`; one rank has the whole.

    Where the ranks do not divide it, the shares are padded to the same size.
    """
    share = -(-shape[dim] // ranks.size)
    placement = Placement(dim, shape, ranks.rank * share) if ranks.size > 1 else None
    return new_parameter(*shape[:dim], share, *shape[dim + 1 :], init=init, placement=placement)


def placement_of(parameter: nn.Parameter) -> Placement:
    return cast(_DeclaredParameter, parameter).placement


def init_of(parameter: nn.Parameter) -> Init:
    return cast(_DeclaredParameter, parameter).init


@torch.no_grad()
def initialize(module: nn.Module, seed: int) -> None:
    """Fill every parameter of `module` as a function of (seed, its full name, global index) and nothing else.

    Any layout, device or order therefore begins with the same model, and no rank ever holds more than its own part.
    """
    for name, parameter in module.named_parameters():
        initialize_parameter(name, parameter, seed)


@torch.no_grad()
def initialize_parameter(name: str, parameter: nn.Parameter, seed: int) -> None:
    """Fill one parameter; `name` is its full name in the model. It must be whole on this rank, not ZeRO-partitioned."""
    init: Init | None = getattr(parameter, "init", None)
    if init is None:
        raise ValueError(f"parameter {name} does not say how it begins; make it with parameters.declare")
    if init.std == 0:
        parameter.fill_(init.value)
        return
    # sha256, since Python's own hash of a string differs from process to process.
    key = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "little", signed=True)
    flat = parameter.data.view(-1)
    for begin, index in _global_indices(parameter):
        # In float64 up to the last step: a model in bf16 then begins as the rounded model in fp32.
        flat[begin : begin + len(index)] = (normal_at(key, index) * init.std).to(parameter.dtype)
    placement = placement_of(parameter)
    if placement.sharded_dim is not None:
        # Rows that pad the vocabulary. Zeros add nothing to a product, and stay zeros without a gradient.
        local = parameter.shape[placement.sharded_dim]
        kept = placement.kept(local)
        parameter.narrow(placement.sharded_dim, kept, local - kept).zero_()


_CHUNK = 1 << 18  # values made at a time: the float64 work space stays in cache and far below the parameter's size


def _global_indices(parameter: nn.Parameter) -> Iterator[tuple[int, torch.Tensor]]:
    """(first local flat index, int64 global flat indices of the values that follow it), chunk by chunk."""
    placement, device = placement_of(parameter), parameter.device
    shape = placement.global_shape
    dim = placement.sharded_dim or 0
    inner = 1
    for size in shape[dim + 1 :]:
        inner *= size
    local, whole = parameter.shape[dim] * inner, shape[dim] * inner
    for begin in range(0, parameter.numel(), _CHUNK):
        index = torch.arange(begin, min(begin + _CHUNK, parameter.numel()), device=device)
        if placement.sharded_dim is not None:  # in front of the divided dimension rows are `whole` apart, not `local`
            index = index // local * whole + placement.start * inner + index % local
        yield begin, index
