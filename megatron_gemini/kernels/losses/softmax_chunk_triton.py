"""The loss's work on a chunk of logits as two Triton kernels; see `softmax_chunk.LossBackend` for what they compute.

Each reads a logit once, in whatever dtype it has, and computes in float32: no copy of the chunk, one pass a kernel.

Shape suffixes: C tokens of the chunk, V vocabulary rows of this rank that are not padding.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from megatron_gemini.kernels.losses.softmax_chunk import (
    KeptExponentials,
    Labels,
    LossBackend,
    Normalizer,
    Statistics,
)
from megatron_gemini.kernels.triton_kernel import Kernel, on_device

# Columns that a program holds at once: 16 a thread of 8 warps, two 16-byte loads of bfloat16. Compiled for compute
# capability 8.0 and 9.0, the kernels take 48 registers and spill none (docs/performance.md).
BLOCK = 4096
WARPS = 8


@triton.jit
def statistics_kernel(
    logits,
    column_C,
    held_C,
    largest_C,
    sum_C,
    target_C,
    stride,
    columns,
    block: tl.constexpr,
):
    """One program a token. The sum has `block` lanes, so a step over the columns has one reduction, the maximum."""
    token = tl.program_id(0)  # 64-bit below: a chunk may have more than 2^31 logits
    row = logits + token.to(tl.int64) * stride
    largest = float("-inf")
    sums = tl.zeros([block], dtype=tl.float32)
    for start in range(0, columns, block):
        column = start + tl.arange(0, block)
        value = tl.load(row + column, mask=column < columns, other=float("-inf")).to(tl.float32)
        larger = tl.maximum(largest, tl.max(value, 0))
        sums = sums * tl.exp(largest - larger) + tl.exp(value - larger)
        largest = larger
    held = tl.load(held_C + token) != 0
    target = tl.load(row + tl.load(column_C + token), mask=held, other=float("-inf")).to(tl.float32)
    tl.store(largest_C + token, largest)
    tl.store(sum_C + token, tl.sum(sums, 0))
    tl.store(target_C + token, target)


@triton.jit
def gradient_kernel(
    logits,
    column_C,
    held_C,
    largest_C,
    sum_C,
    of_softmax_C,
    of_target_C,
    stride,
    columns,
    block: tl.constexpr,
):
    """One program a token and block of columns; logits become of_softmax * softmax - of_target * onehot(target)."""
    token = tl.program_id(0)
    column = tl.program_id(1) * block + tl.arange(0, block)
    place = logits + token.to(tl.int64) * stride + column
    inside = column < columns
    value = tl.load(place, mask=inside, other=float("-inf")).to(tl.float32)
    factor = tl.load(of_softmax_C + token) / tl.load(sum_C + token)
    grad = tl.exp(value - tl.load(largest_C + token)) * factor
    is_target = (column == tl.load(column_C + token)) & (tl.load(held_C + token) != 0)
    grad -= tl.where(is_target, tl.load(of_target_C + token), 0.0)
    tl.store(place, grad.to(logits.dtype.element_ty), mask=inside)


def _held(labels: Labels) -> torch.Tensor:
    held = torch.ones_like(labels.column_C, dtype=torch.bool) if labels.held_C is None else labels.held_C
    return held.view(torch.uint8)


def statistics(logits_CV: torch.Tensor, labels: Labels) -> Statistics:
    tokens, columns = logits_CV.shape
    largest_C, sum_C, target_C = torch.empty(3, tokens, dtype=torch.float32, device=logits_CV.device)
    _launch(
        statistics_kernel,
        (tokens,),
        logits_CV,
        labels.column_C,
        _held(labels),
        largest_C,
        sum_C,
        target_C,
        logits_CV.stride(0),
        columns,
    )
    return Normalizer(largest_C, sum_C), target_C, None


def gradient(
    logits_CV: torch.Tensor,
    kept: KeptExponentials | None,
    normalizer: Normalizer,
    of_softmax_C: torch.Tensor,
    of_target_C: torch.Tensor,
    labels: Labels,
) -> torch.Tensor:
    assert kept is None, "another backend's statistics changed these logits"
    tokens, columns = logits_CV.shape
    _launch(
        gradient_kernel,
        (tokens, triton.cdiv(columns, BLOCK)),
        logits_CV,
        labels.column_C,
        _held(labels),
        *normalizer,
        of_softmax_C.contiguous(),
        of_target_C.contiguous(),
        logits_CV.stride(0),
        columns,
    )
    return logits_CV


def _launch(kernel: Kernel, grid: tuple[int, ...], logits_CV: torch.Tensor, *arguments: torch.Tensor | int) -> None:
    if len(logits_CV):  # a grid of no programs is an error of CUDA
        with on_device(logits_CV.device):
            kernel[grid](logits_CV, *arguments, block=BLOCK, num_warps=WARPS)


TRITON = LossBackend("triton", statistics, gradient)
