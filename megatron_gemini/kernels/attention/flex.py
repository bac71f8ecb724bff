"""Attention by torch's FlexAttention: compiled on CUDA, as written (slow, and with a whole mask) on CPU for tests.

Shape suffixes: T packed tokens, or in the cross form M memory embeddings; Q queries (T, or this rank's), N query heads,
K key/value heads, H head width.
"""

from __future__ import annotations

from functools import cache
from weakref import WeakKeyDictionary

import torch
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask, flex_attention

from megatron_gemini.kernels.attention.plan import AttentionPlan
from megatron_gemini.kernels.rope import CosSin

_compiled = cache(lambda: torch.compile(flex_attention, dynamic=False))  # at the first call, which a CPU never makes
_block_masks: WeakKeyDictionary[AttentionPlan, BlockMask] = WeakKeyDictionary()  # made once a plan, for all layers


def attend_by_flex(
    q_QNH: torch.Tensor,
    k_TKH: torch.Tensor,
    v_TKH: torch.Tensor,
    plan: AttentionPlan,
    scale: float | None,
    cos_sin: CosSin | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out_QNH, lse_QN): see `api.attention_with_lse`."""
    if cos_sin is not None:
        q_QNH, k_TKH = plan.apply_rope(q_QNH, k_TKH, cos_sin)
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q_QNH, k_TKH, v_TKH))
    if not torch.is_grad_enabled():  # on the CPU it refuses inputs that could need a gradient
        q, k, v = q.detach(), k.detach(), v.detach()
    attend = _compiled() if q.device.type == "cuda" else flex_attention
    out, aux = attend(
        q,
        k,
        v,
        block_mask=_block_mask(plan),
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
        return_aux=AuxRequest(lse=True),  # type: ignore[arg-type]  # torch.compile's stub keeps one overload of four
    )
    return out[0].transpose(0, 1), aux.lse[0].transpose(0, 1)


def _block_mask(plan: AttentionPlan) -> BlockMask:
    if plan not in _block_masks:
        start_Q, reach_Q = plan.bounds.query_2Q

        def sees(_: torch.Tensor, __: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
            return (key >= start_Q[query]) & (key < reach_Q[query])

        _block_masks[plan] = create_block_mask(sees, None, None, plan.queries, plan.keys, device=start_Q.device)
    return _block_masks[plan]
