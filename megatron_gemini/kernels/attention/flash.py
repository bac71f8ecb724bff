"""Attention by the flash-attn package, version 2, 3 or 4, where it is installed: rows of causal or of whole documents.

Its packed call has one mask for all documents, so a row that mixes causal tokens and spans goes elsewhere.

Shape suffixes: T packed tokens, N query heads, K key/value heads, H head width.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F

from megatron_gemini.kernels.attention.plan import AttentionPlan
from megatron_gemini.kernels.rope import CosSin

_MODULES = ((4, "flash_attn.cute"), (3, "flash_attn_interface"), (2, "flash_attn"))


@lru_cache(maxsize=1)
def installed_flash_attention() -> tuple[int, Callable[..., torch.Tensor]] | None:
    """(version, its packed call) of the newest one that can be imported."""
    for version, module in _MODULES:
        try:
            return version, importlib.import_module(module).flash_attn_varlen_func
        except (ImportError, AttributeError, OSError):  # not there, too old, or built for another torch
            continue
    return None


def attend_by_flash_attention(
    q_TNH: torch.Tensor,
    k_TKH: torch.Tensor,
    v_TKH: torch.Tensor,
    plan: AttentionPlan,
    scale: float | None,
    cos_sin: CosSin | None,
    *,
    with_lse: bool = False,
) -> tuple[torch.Tensor, None]:
    """See `api.attention`; the plan has `sequences`."""
    found, sequences = installed_flash_attention(), plan.sequences
    assert found is not None and sequences is not None and not with_lse, "the dispatch point asks first"
    if cos_sin is not None:
        q_TNH, k_TKH = plan.apply_rope(q_TNH, k_TKH, cos_sin)
    real, edges, longest = sequences.real, sequences.edges, sequences.longest
    # Versions differ in whether they want the longest length, and in whether they can be told to be deterministic. Left
    # to itself the backward adds by atomics, and a resumed run would not have the bits of one that was not stopped.
    known = inspect.signature(found[1]).parameters
    options = {"max_seqlen_q": longest, "max_seqlen_k": longest, "deterministic": True}
    result = found[1](
        *(x[:real] for x in (q_TNH, k_TKH, v_TKH)),
        cu_seqlens_q=edges,
        cu_seqlens_k=edges,
        softmax_scale=scale,
        causal=sequences.causal,
        **{name: value for name, value in options.items() if name in known},
    )
    out = result[0] if isinstance(result, tuple) else result  # version 4 returns the log-sum-exp as well
    return (out if real == plan.keys else F.pad(out, (0, 0, 0, 0, 0, plan.keys - real))), None
