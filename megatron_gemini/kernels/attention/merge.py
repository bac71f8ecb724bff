"""Partial attention results, over different keys, to the result over all of them, by their log-sum-exp.

Shape suffixes: Q queries, N query heads, H head width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def merge_attention(parts: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """(out_QNH, lse_QN) over all keys, from those over disjoint sets of keys (Dao et al. 2022, section 3.1).

    out [Q, N, H], lse float32 [Q, N]; -inf where a query saw no key. A query that saw none at all has the output 0 and
    the log-sum-exp -inf. Differentiable in all its inputs. Raises ValueError if there is nothing to merge.
    """
    if not parts:
        raise ValueError("merge_attention was given no parts; it needs at least one (out, lse)")
    out, lse = parts[0]
    for more_out, more_lse in parts[1:]:
        out, lse = merge_two(out, lse, more_out, more_lse)
    return out, lse


def merge_two(
    out_QNH: torch.Tensor, lse_QN: torch.Tensor, more_QNH: torch.Tensor, more_lse_QN: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`merge_attention` of two parts: weights exp(lse - total), where exp(total) = exp(lse) + exp(more_lse)."""
    # Only ratios of the weights' sums are formed, none of which is above 1: large scores do not overflow.
    nothing = torch.maximum(lse_QN, more_lse_QN) == float("-inf")
    a_QN, b_QN = lse_QN.masked_fill(nothing, 0.0), more_lse_QN.masked_fill(nothing, 0.0)  # -inf minus -inf is no number
    total = torch.logaddexp(a_QN, b_QN)
    out = out_QNH * (a_QN - total).exp().unsqueeze(-1) + more_QNH * (b_QN - total).exp().unsqueeze(-1)
    return out.to(out_QNH.dtype), total.masked_fill(nothing, float("-inf"))
