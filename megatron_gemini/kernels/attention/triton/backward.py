"""Flash attention's backward in Triton: one kernel for the gradient of keys and values, one for that of queries.

Each gradient has one program that sums it, in a fixed order and without atomics, so that the result is the same bit for
bit every time. The price is that scores are computed twice: seven matrix products instead of five. The gradients of
keys and values are sums over all query heads that share them. These heads are rows of the blocks, so the sum takes
place in the accumulator, without a buffer a head.

With p = exp(scale q k - lse) and delta = sum(out * grad), the gradient of the scores is ds = p * (grad v - delta). Then
dv is the sum of p grad, dk of scale ds q and dq of scale ds k. A log-sum-exp's gradient g adds p g to ds, which is
delta - g in the place of delta.

See `forward` for rows and blocks. Shape suffixes: T packed tokens, or in the cross form M memory embeddings; Q queries,
N query heads, K key/value heads, G = N / K, H head width.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megatron_gemini.kernels.attention.triton.blocks import (
    head_source,
    load_heads,
    product,
    to_block,
    up_to_block,
)


@triton.jit
def prepare_kernel(
    out_ptr,  # [Q, N, H], contiguous
    grad_ptr,  # [Q, N, H], contiguous
    lse_ptr,  # float32 [Q, N]
    lse_grad_ptr,  # float32 [Q, N]
    lse2_ptr,  # float32 [Q, N], result: the log-sum-exp in base 2, +inf where a query sees no key
    delta_ptr,  # float32 [Q, N], result: sum(out * grad) - lse_grad
    rows,
    H: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    column = tl.arange(0, WIDTH)
    live = row < rows
    held = live[:, None] & (column < H)[None, :]
    place = row.to(tl.int64)[:, None] * H + column[None, :]
    out = tl.load(out_ptr + place, mask=held, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + place, mask=held, other=0.0).to(tl.float32)
    lse = tl.load(lse_ptr + row, mask=live, other=0.0)
    delta = tl.sum(out * grad, 1) - tl.load(lse_grad_ptr + row, mask=live, other=0.0)
    empty = lse == float("-inf")  # exp2(score - inf) is 0: a query that sees nothing gives and gets no gradient
    tl.store(lse2_ptr + row, tl.where(empty, float("inf"), lse * 1.4426950408889634), mask=live)
    tl.store(delta_ptr + row, tl.where(empty, 0.0, delta), mask=live)


@triton.jit
def key_gradient_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    grad_ptr,
    lse2_ptr,
    delta_ptr,
    k_grad_ptr,  # [SPLITS, T, K, H], contiguous
    v_grad_ptr,
    first_ptr,  # int32 [T]: key t is seen by the queries [first, last)
    last_ptr,
    order_ptr,
    q_token,
    q_head,
    k_token,
    k_head,
    v_token,
    v_head,
    scale,
    scale2,
    queries,
    tokens,
    tiles,
    SPLITS: tl.constexpr,  # groups of heads that programs of their own sum
    K: tl.constexpr,
    G: tl.constexpr,
    H: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
):
    GROUP: tl.constexpr = G // SPLITS
    column = tl.arange(0, WIDTH)
    q_source = head_source(q_ptr, queries, q_token, K * G, q_head, H, WIDTH, GROUP, BLOCK_M, TMA)
    grad_source = head_source(grad_ptr, queries, K * G * H, K * G, H, H, WIDTH, GROUP, BLOCK_M, TMA)
    for work in tl.range(tl.program_id(0), tiles * K * SPLITS, tl.num_programs(0)):
        kv, split = work % K, work // K % SPLITS
        head = kv * G + split * GROUP
        n = tl.load(order_ptr + work // (K * SPLITS)) * BLOCK_N
        key = n + tl.arange(0, BLOCK_N)
        live = key < tokens
        first = tl.load(first_ptr + key, mask=live, other=queries)
        last = tl.load(last_ptr + key, mask=live, other=0)
        # Once a tile, so by pointer: descriptors are for what the loop below reads.
        k = load_heads(k_ptr, n, kv, k_token, k_head, tokens, H, WIDTH, 1, BLOCK_N, False, True)
        v = load_heads(v_ptr, n, kv, v_token, v_head, tokens, H, WIDTH, 1, BLOCK_N, False, True)
        # As in the forward: every key of the block is seen by all the rows of [full, full_end).
        low, high = to_block(tl.min(first) * GROUP, BLOCK_M), tl.max(last) * GROUP
        full = tl.minimum(up_to_block(tl.max(tl.where(live, first, 0)) * GROUP, BLOCK_M), high)
        full_end = tl.maximum(to_block(tl.min(tl.where(live, last, queries)) * GROUP, BLOCK_M), full)

        dk = tl.zeros((BLOCK_N, WIDTH), tl.float32)
        dv = tl.zeros((BLOCK_N, WIDTH), tl.float32)
        for part in tl.static_range(3):
            begin = low if part == 0 else full if part == 1 else full_end
            end = full if part == 0 else full_end if part == 1 else high
            dk, dv = _sum_over_rows(
                dk, dv, k, v, q_source, grad_source, lse2_ptr, delta_ptr, first, last, begin, end, head,
                q_token, q_head, queries, scale2,
                K * G, GROUP, H, WIDTH, BLOCK_M, PRECISION, TMA, part != 1,
            )  # fmt: skip

        place = ((split * tokens + key).to(tl.int64) * K + kv)[:, None] * H + column[None, :]
        held = live[:, None] & (column < H)[None, :]
        tl.store(k_grad_ptr + place, (dk * scale).to(k_grad_ptr.dtype.element_ty), mask=held)
        tl.store(v_grad_ptr + place, dv.to(v_grad_ptr.dtype.element_ty), mask=held)


@triton.jit
def _sum_over_rows(
    dk,
    dv,
    k,
    v,
    q_source,
    grad_source,
    lse2_ptr,
    delta_ptr,
    first,
    last,
    begin,
    end,
    first_head,
    q_token,
    q_head,
    queries,
    scale2,
    N: tl.constexpr,
    GROUP: tl.constexpr,
    H: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
    MASKED: tl.constexpr,
):
    for m in tl.range(begin, end, BLOCK_M):
        q = load_heads(q_source, m, first_head, q_token, q_head, queries, H, WIDTH, GROUP, BLOCK_M, TMA, MASKED)
        grad = load_heads(grad_source, m, first_head, N * H, H, queries, H, WIDTH, GROUP, BLOCK_M, TMA, MASKED)
        row = m + tl.arange(0, BLOCK_M)
        token = row // GROUP
        place = token * N + first_head + row % GROUP
        if MASKED:
            lse2 = tl.load(lse2_ptr + place, mask=token < queries, other=float("inf"))
            delta = tl.load(delta_ptr + place, mask=token < queries, other=0.0)
        else:
            lse2 = tl.load(lse2_ptr + place)
            delta = tl.load(delta_ptr + place)
        p = tl.exp2(product(k, q.T, PRECISION=PRECISION) * scale2 - lse2[None, :])
        if MASKED:
            seen = (token[None, :] >= first[:, None]) & (token[None, :] < last[:, None])
            p = tl.where(seen, p, 0.0)
        dv = product(p.to(grad.dtype), grad, dv, PRECISION=PRECISION)
        ds = p * (product(v, grad.T, PRECISION=PRECISION) - delta[None, :])
        dk = product(ds.to(q.dtype), q, dk, PRECISION=PRECISION)
    return dk, dv


@triton.jit
def query_gradient_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    grad_ptr,
    lse2_ptr,
    delta_ptr,
    q_grad_ptr,  # [Q, N, H], contiguous
    start_ptr,
    reach_ptr,
    order_ptr,
    q_token,
    q_head,
    k_token,
    k_head,
    v_token,
    v_head,
    scale,
    scale2,
    queries,
    tokens,
    tiles,
    K: tl.constexpr,
    G: tl.constexpr,
    H: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
):
    column = tl.arange(0, WIDTH)
    keys = head_source(k_ptr, tokens, k_token, K, k_head, H, WIDTH, 1, BLOCK_N, TMA)
    values = head_source(v_ptr, tokens, v_token, K, v_head, H, WIDTH, 1, BLOCK_N, TMA)
    for work in tl.range(tl.program_id(0), tiles * K, tl.num_programs(0)):
        kv = work % K
        m = tl.load(order_ptr + work // K) * BLOCK_M
        row = m + tl.arange(0, BLOCK_M)
        token, head = row // G, kv * G + row % G
        live = token < queries
        start = tl.load(start_ptr + token, mask=live, other=tokens)
        reach = tl.load(reach_ptr + token, mask=live, other=0)
        q = load_heads(q_ptr, m, kv * G, q_token, q_head, queries, H, WIDTH, G, BLOCK_M, False, True)
        grad = load_heads(grad_ptr, m, kv * G, K * G * H, H, queries, H, WIDTH, G, BLOCK_M, False, True)
        lse2 = tl.load(lse2_ptr + token * (K * G) + head, mask=live, other=float("inf"))
        delta = tl.load(delta_ptr + token * (K * G) + head, mask=live, other=0.0)
        low, high = to_block(tl.min(start), BLOCK_N), tl.max(reach)
        full = tl.minimum(up_to_block(tl.max(tl.where(live, start, 0)), BLOCK_N), high)
        full_end = tl.maximum(to_block(tl.min(tl.where(live, reach, tokens)), BLOCK_N), full)

        dq = tl.zeros((BLOCK_M, WIDTH), tl.float32)
        for part in tl.static_range(3):
            begin = low if part == 0 else full if part == 1 else full_end
            end = full if part == 0 else full_end if part == 1 else high
            dq = _sum_over_keys(
                dq, q, grad, lse2, delta, keys, values, kv, k_token, k_head, v_token, v_head, start, reach, begin, end,
                scale2, tokens, H, WIDTH, BLOCK_N, PRECISION, TMA, part != 1,
            )  # fmt: skip

        place = (token.to(tl.int64) * (K * G) + head)[:, None] * H + column[None, :]
        held = live[:, None] & (column < H)[None, :]
        tl.store(q_grad_ptr + place, (dq * scale).to(q_grad_ptr.dtype.element_ty), mask=held)


@triton.jit
def _sum_over_keys(
    dq,
    q,
    grad,
    lse2,
    delta,
    keys,
    values,
    kv,
    k_token,
    k_head,
    v_token,
    v_head,
    start,
    reach,
    begin,
    end,
    scale2,
    tokens,
    H: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
    MASKED: tl.constexpr,
):
    for n in tl.range(begin, end, BLOCK_N):
        k = load_heads(keys, n, kv, k_token, k_head, tokens, H, WIDTH, 1, BLOCK_N, TMA, MASKED)
        v = load_heads(values, n, kv, v_token, v_head, tokens, H, WIDTH, 1, BLOCK_N, TMA, MASKED)
        p = tl.exp2(product(q, k.T, PRECISION=PRECISION) * scale2 - lse2[:, None])
        if MASKED:
            key = n + tl.arange(0, BLOCK_N)
            p = tl.where((key[None, :] >= start[:, None]) & (key[None, :] < reach[:, None]), p, 0.0)
        ds = p * (product(grad, v.T, PRECISION=PRECISION) - delta[:, None])
        dq = product(ds.to(k.dtype), k, dq, PRECISION=PRECISION)
    return dq
