"""Flash multi-query attention by our Triton kernels, as operators that torch.compile and checkpointing understand.

Shape suffixes: T packed tokens, Q queries (T, or this rank's), N query heads, K key/value heads, G = N / K, H head
width.
"""

from __future__ import annotations

import math
from typing import TypeAlias

import torch

from megatron_gemini.kernels.attention.plan import AttentionPlan
from megatron_gemini.kernels.attention.triton.backward import key_gradient_kernel, prepare_kernel, query_gradient_kernel
from megatron_gemini.kernels.attention.triton.forward import forward_kernel
from megatron_gemini.kernels.attention.triton.tiling import (
    choose_tilings,
    constants,
    launch,
    padded_width,
    split_heads,
)
from megatron_gemini.kernels.autograd import Gradients, NodeContext
from megatron_gemini.kernels.rope import CosSin
from megatron_gemini.kernels.triton_kernel import on_device

LOG2_E = math.log2(math.e)
PREPARED_ROWS = 32


def attend_by_triton(
    q_QNH: torch.Tensor,
    k_TKH: torch.Tensor,
    v_TKH: torch.Tensor,
    plan: AttentionPlan,
    scale: float | None,
    cos_sin: CosSin | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out_QNH, lse_QN): see `api.attention_with_lse`. Queries and keys are rotated before the kernel."""
    # Rotating 8k tokens of 16 heads of 128 moves 67 MB, 20 us of an H100's 3.35 TB/s beside 0.55 ms of a forward at 500
    # TFLOP/s. In the kernel, the backward would rotate each block of queries again for every block of keys.
    if cos_sin is not None:
        q_QNH, k_TKH = plan.apply_rope(q_QNH, k_TKH, cos_sin)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q_QNH, k_TKH, v_TKH))
    tilings = choose_tilings(q)
    bounds, group = plan.bounds, q.shape[1] // k.shape[1]
    orders = (
        bounds.order("query", group, tilings.forward.block_m),
        bounds.order("query", group, tilings.query_gradient.block_m),
        bounds.order("key", 1, tilings.key_gradient.block_n),
    )
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return flash_attention(q, k, v, bounds.query_2Q, bounds.key_2T, *orders, scale)


# Operators of torch.library and not autograd functions: torch.compile and checkpointing see one node of a known shape.
@torch.library.custom_op("megatron_gemini::flash_attention", mutates_args=())
def flash_attention(
    q_QNH: torch.Tensor,
    k_TKH: torch.Tensor,
    v_TKH: torch.Tensor,
    query_2Q: torch.Tensor,
    key_2T: torch.Tensor,
    forward_order: torch.Tensor,
    query_order: torch.Tensor,
    key_order: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out_QNH, lse_QN). The bounds and orders are those of `bounds.Bounds`."""
    out_QNH, lse_QN = _empty_results(q_QNH)
    tiling = choose_tilings(q_QNH).forward
    tiles, kv_heads = len(forward_order), k_TKH.shape[1]
    launch(
        forward_kernel,
        tiling,
        tiles * kv_heads,
        q_QNH,
        k_TKH,
        v_TKH,
        out_QNH,
        lse_QN,
        query_2Q[0],
        query_2Q[1],
        forward_order,
        *_strides(q_QNH, k_TKH, v_TKH),
        scale * LOG2_E,
        len(q_QNH),
        len(k_TKH),
        tiles,
        **constants(tiling, q_QNH, k_TKH, v_TKH),
    )
    return out_QNH, lse_QN


@flash_attention.register_fake
def _(q_QNH: torch.Tensor, *_: torch.Tensor | float) -> tuple[torch.Tensor, torch.Tensor]:
    return _empty_results(q_QNH)


@torch.library.custom_op("megatron_gemini::flash_attention_backward", mutates_args=())
def flash_attention_backward(
    out_grad_QNH: torch.Tensor,
    lse_grad_QN: torch.Tensor,
    q_QNH: torch.Tensor,
    k_TKH: torch.Tensor,
    v_TKH: torch.Tensor,
    out_QNH: torch.Tensor,
    lse_QN: torch.Tensor,
    query_2Q: torch.Tensor,
    key_2T: torch.Tensor,
    query_order: torch.Tensor,
    key_order: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q_QNH, k_TKH and v_TKH, the same bits every time."""
    grad, lse_grad = out_grad_QNH.contiguous(), lse_grad_QN.contiguous()
    # A gradient may be a part of something larger. Descriptors want it aligned, and they were chosen by q, k and v.
    if grad.data_ptr() % 16:
        grad = grad.clone()
    # Once a row, and not once for every block of keys that the row meets.
    lse2_QN, delta_QN = torch.empty_like(lse_QN), torch.empty_like(lse_QN)
    width = q_QNH.shape[2]
    blocks = -(-lse_QN.numel() // PREPARED_ROWS)
    if blocks:
        sizes = (lse_QN.numel(), width, padded_width(width), PREPARED_ROWS)
        with on_device(grad.device):
            prepare_kernel[(blocks,)](out_QNH, grad, lse_QN, lse_grad, lse2_QN, delta_QN, *sizes)
    shared = (q_QNH, k_TKH, v_TKH, grad, lse2_QN, delta_QN)
    q_grad = _query_gradient(*shared, query_2Q, query_order, scale)
    return q_grad, *_key_gradients(*shared, key_2T, key_order, scale)


@flash_attention_backward.register_fake
def _(
    out_grad_QNH: torch.Tensor,
    lse_grad_QN: torch.Tensor,
    q_QNH: torch.Tensor,
    k_TKH: torch.Tensor,
    v_TKH: torch.Tensor,
    *_: torch.Tensor | float,
) -> tuple[torch.Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in (q_QNH, k_TKH, v_TKH))


class _FlashContext(NodeContext):
    scale: float


_X: TypeAlias = torch.Tensor
_Arguments: TypeAlias = tuple[_X, _X, _X, _X, _X, _X, _X, _X, float]  # those of `flash_attention`


def _save(ctx: _FlashContext, inputs: _Arguments, output: tuple[torch.Tensor, torch.Tensor]) -> None:
    q, k, v, query_2Q, key_2T, _, query_order, key_order, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output, query_2Q, key_2T, query_order, key_order)


def _backward(ctx: _FlashContext, out_grad: torch.Tensor, lse_grad: torch.Tensor) -> Gradients:
    grads = flash_attention_backward(out_grad, lse_grad, *ctx.saved_tensors, ctx.scale)
    return *grads, *[None] * 6


flash_attention.register_autograd(_backward, setup_context=_save)


def _query_gradient(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    grad: torch.Tensor,
    lse2: torch.Tensor,
    delta: torch.Tensor,
    query_2Q: torch.Tensor,
    order: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    q_grad = q.new_empty(q.shape)
    tiling = choose_tilings(q).query_gradient
    launch(
        query_gradient_kernel,
        tiling,
        len(order) * k.shape[1],
        q,
        k,
        v,
        grad,
        lse2,
        delta,
        q_grad,
        query_2Q[0],
        query_2Q[1],
        order,
        *_strides(q, k, v),
        scale,
        scale * LOG2_E,
        len(q),
        len(k),
        len(order),
        **constants(tiling, q, k, v),
    )
    return q_grad


def _key_gradients(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    grad: torch.Tensor,
    lse2: torch.Tensor,
    delta: torch.Tensor,
    key_2T: torch.Tensor,
    order: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One program sums a block of keys over all heads, or, if there are few such programs, over a group of heads."""
    # A row of 2,048 tokens and one key/value head has 16 blocks of 128 keys for the 132 multiprocessors of an H100.
    tiling = choose_tilings(q).key_gradient
    splits = split_heads(len(order) * k.shape[1], q.shape[1] // k.shape[1], q.device)
    dtype = k.dtype if splits == 1 else torch.float32
    k_grad, v_grad = (torch.empty(splits, *k.shape, dtype=dtype, device=k.device) for _ in range(2))
    launch(
        key_gradient_kernel,
        tiling,
        len(order) * k.shape[1] * splits,
        q,
        k,
        v,
        grad,
        lse2,
        delta,
        k_grad,
        v_grad,
        key_2T[0],
        key_2T[1],
        order,
        *_strides(q, k, v),
        scale,
        scale * LOG2_E,
        len(q),
        len(k),
        len(order),
        SPLITS=splits,
        **constants(tiling, q, k, v),
    )
    return _tree_sum(k_grad).to(k.dtype), _tree_sum(v_grad).to(v.dtype)


def _tree_sum(parts_S: torch.Tensor) -> torch.Tensor:
    """The sum over the first dimension, a power of two, always in the same order: the same bits in every run."""
    while len(parts_S) > 1:
        half = len(parts_S) // 2
        parts_S = parts_S[:half] + parts_S[half:]
    return parts_S[0]


def _empty_results(q_QNH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return q_QNH.new_empty(q_QNH.shape), q_QNH.new_empty(q_QNH.shape[:2], dtype=torch.float32)


def _strides(*tensors: torch.Tensor) -> list[int]:
    return [stride for x in tensors for stride in x.stride()[:2]]
