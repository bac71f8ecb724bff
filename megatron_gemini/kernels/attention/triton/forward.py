"""Flash attention's forward in Triton, for packed rows (Dao et al. 2022; Dao 2023; multi-query: Shazeer 2019).

One program takes BLOCK_M rows. A row is a query head of a token. Token by token, all G heads that share a key/value
head lie side by side, and read a block of keys and values once. A block of rows is so few tokens long that a mask is
needed at the edges of documents and on the diagonal only.

A query sees the keys [start, reach) of its own, two numbers a token. Causal order, spans, documents and memory need no
other metadata, and blocks that no row sees are not touched.

Shape suffixes: T packed tokens, or in the cross form M memory embeddings; Q queries, N query heads, K key/value heads,
G = N / K, H head width.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megatron_gemini.kernels.attention.triton.blocks import head_source, load_heads, product, to_block, up_to_block


@triton.jit
def forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,  # float32 [Q, N]: the natural logarithm, -inf where a query sees no key
    start_ptr,  # int32 [Q]
    reach_ptr,  # int32 [Q]
    order_ptr,  # int32 [tiles]: the longest tile first
    q_token,
    q_head,
    k_token,
    k_head,
    v_token,
    v_head,
    scale2,  # scale * log2(e): exp2 is what the hardware has
    queries,
    tokens,
    tiles,
    K: tl.constexpr,
    G: tl.constexpr,
    H: tl.constexpr,
    WIDTH: tl.constexpr,  # H rounded up to a power of two
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
):
    # Programs are as many as fit the card and take tile after tile, so that descriptors are made once a program.
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
        low, high = to_block(tl.min(start), BLOCK_N), tl.max(reach)
        # every row sees all of [full, full_end); rows behind the last query are computed with it and not stored
        full = tl.minimum(up_to_block(tl.max(tl.where(live, start, 0)), BLOCK_N), high)
        full_end = tl.maximum(to_block(tl.min(tl.where(live, reach, tokens)), BLOCK_N), full)

        total = tl.full((BLOCK_M,), 0.0, tl.float32)
        top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        acc = tl.zeros((BLOCK_M, WIDTH), tl.float32)
        for part in tl.static_range(3):
            begin = low if part == 0 else full if part == 1 else full_end
            end = full if part == 0 else full_end if part == 1 else high
            acc, total, top = _attend(
                acc, total, top, q, keys, values, kv, k_token, k_head, v_token, v_head, start, reach, begin, end,
                scale2, tokens, H, WIDTH, BLOCK_N, PRECISION, TMA, part != 1,
            )  # fmt: skip

        sees = reach > start
        total = tl.where(sees, total, 1.0)
        out = tl.where(sees[:, None], acc / total[:, None], 0.0)
        lse = tl.where(sees, (top + tl.log2(total)) * 0.6931471805599453, float("-inf"))
        flat = token.to(tl.int64) * (K * G) + head
        held = live[:, None] & (column < H)[None, :]
        tl.store(out_ptr + flat[:, None] * H + column[None, :], out.to(out_ptr.dtype.element_ty), mask=held)
        tl.store(lse_ptr + flat, lse, mask=live)


@triton.jit
def _attend(
    acc,
    total,
    top,
    q,
    keys,
    values,
    kv,
    k_token,
    k_head,
    v_token,
    v_head,
    start,
    reach,
    first,
    last,
    scale2,
    tokens,
    H: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
    MASKED: tl.constexpr,
):
    """The blocks of keys from `first` on, below `last`: online softmax (Milakov and Gimelshein 2018) in base 2."""
    # exp2 is what the hardware has, 16 a cycle and multiprocessor of an H100. For heads of 128 the exponentials alone
    # take half the time of the products (docs/performance.md), so the two must overlap.
    # Triton 3.9 ignores warp_specialize=True here: the same registers, shared memory and instructions for Hopper.
    for n in tl.range(first, last, BLOCK_N):
        k = load_heads(keys, n, kv, k_token, k_head, tokens, H, WIDTH, 1, BLOCK_N, TMA, MASKED)
        score = product(q, k.T, PRECISION=PRECISION)
        if MASKED:
            key = n + tl.arange(0, BLOCK_N)
            seen = (key[None, :] >= start[:, None]) & (key[None, :] < reach[:, None])
            score = tl.where(seen, score * scale2, float("-inf"))
            new_top = tl.maximum(top, tl.max(score, 1))
            base = tl.where(new_top == float("-inf"), 0.0, new_top)  # a row that has seen nothing yet
            p = tl.exp2(score - base[:, None])
            shrink = tl.exp2(top - base)
        else:
            new_top = tl.maximum(top, tl.max(score, 1) * scale2)
            p = tl.exp2(score * scale2 - new_top[:, None])
            shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None]
        v = load_heads(values, n, kv, v_token, v_head, tokens, H, WIDTH, 1, BLOCK_N, TMA, MASKED)
        acc = product(p.to(v.dtype), v, acc, PRECISION=PRECISION)
        top = new_top
    return acc, total, top
