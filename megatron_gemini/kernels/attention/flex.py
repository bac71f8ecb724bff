"""Attention by torch's FlexAttention: compiled on CUDA, as written (slow, and with a T x T mask) on CPU for tests.

Shape suffixes: T packed tokens, Q queries (T, or this rank's), N query heads, K key/value heads, H head width.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask, flex_attention

from megatron_gemini.kernels.attention.plan import AttentionPlan
from megatron_gemini.kernels.rope import CosSin


def attend_by_flex(
    q_QNH: torch.Tensor,
    k_TKH: torch.Tensor,
    v_TKH: torch.Tensor,
    plan: AttentionPlan,
    scale: float | None,
    cos_sin: CosSin | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out_QNH, lse_QN): see `attention.attention_with_lse`."""
    if cos_sin is not None:
        q_QNH, k_TKH = plan.apply_rope(q_QNH, k_TKH, cos_sin)
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q_QNH, k_TKH, v_TKH))
    if not torch.is_grad_enabled():  # on the CPU it refuses inputs that could need a gradient
        q, k, v = q.detach(), k.detach(), v.detach()
    out, aux = _attend(q.device.type)(
        q,
        k,
        v,
        block_mask=plan.remember("flex", _block_mask),
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
        return_aux=AuxRequest(lse=True),
    )
    return out[0].transpose(0, 1), aux.lse[0].transpose(0, 1)


@lru_cache(maxsize=2)
def _attend(device: str) -> Any:
    return torch.compile(flex_attention, dynamic=False) if device == "cuda" else flex_attention


def _block_mask(plan: AttentionPlan) -> BlockMask:
    start_Q, reach_Q = plan.bounds.query_2Q

    def sees(_: torch.Tensor, __: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return (key >= start_Q[query]) & (key < reach_Q[query])

    return create_block_mask(sees, None, None, plan.queries, plan.tokens, device=start_Q.device)
