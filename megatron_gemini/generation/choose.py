"""From logits to a token: guidance, temperature, top-k, nucleus (top-p), one random stream per sequence.

Shape suffixes: B sequences, V vocabulary, R tokens by rank, likeliest first.
"""

from __future__ import annotations

import torch


def guide(logits_BV: torch.Tensor, in_codes: list[bool], guidance: float) -> torch.Tensor:
    """Rows of prompted sequences, then of their twins -> rows of the prompted ones, guided inside codes."""
    prompted_BV, twin_BV = logits_BV.chunk(2)
    guided_BV = twin_BV + guidance * (prompted_BV - twin_BV)
    # Text is left alone: training empties the prompts of drawings only, so of words the twin knows nothing.
    drawing_B = torch.tensor(in_codes, device=logits_BV.device)
    return torch.where(drawing_B[:, None], guided_BV, prompted_BV)


def shape_probabilities(logits_BV: torch.Tensor, temperature: float, top_k: int, top_p: float) -> torch.Tensor:
    """Probabilities float32[B, V] after temperature, then top-k, then nucleus sampling (Holtzman et al. 2020, eq. 2).

    top_p keeps the fewest likeliest tokens whose probabilities, renormalized over the top_k, sum to at least top_p.
    Of equal logits the lower id is the likelier one. -inf logits get 0.
    """
    scaled_BV = logits_BV.float() / temperature
    if not top_k and top_p >= 1:
        return scaled_BV.softmax(-1)
    # Stable, or which of two equal logits is kept would depend on the device's way to sort.
    sorted_BR, id_BR = scaled_BV.sort(dim=-1, descending=True, stable=True)
    if top_k:
        sorted_BR[:, top_k:] = float("-inf")
    p_BR = sorted_BR.softmax(-1)
    # Of the likelier ones before it, so that the token that reaches top_p is kept, and always at least one.
    before_BR = p_BR.cumsum(-1) - p_BR
    p_BR = p_BR.masked_fill(before_BR >= top_p, 0)
    p_BR = p_BR / p_BR.sum(-1, keepdim=True)
    return torch.zeros_like(p_BR).scatter(-1, id_BR, p_BR)


def choose(
    logits_BV: torch.Tensor, temperature: float, top_k: int, top_p: float, generators: list[torch.Generator]
) -> list[int]:
    """One token per sequence. Each sequence draws one number of its own CPU generator, whatever its batch mates do."""
    if temperature == 0:
        return logits_BV.argmax(-1).tolist()
    # float64, because rounding in a float32 sum over a vocabulary is larger than the probability of its rare tokens.
    p_BV = shape_probabilities(logits_BV, temperature, top_k, top_p).double()
    # Drawn on the CPU, so that a seed gives the same numbers whatever the device.
    draw_B = torch.stack([torch.rand((), generator=g, dtype=torch.float64) for g in generators]).to(p_BV.device)
    cumulative_BV = p_BV.cumsum(-1)
    # The first token whose cumulative probability exceeds the draw; never one of probability 0.
    threshold_B1 = (draw_B * cumulative_BV[:, -1])[:, None]
    return torch.searchsorted(cumulative_BV, threshold_B1, right=True).squeeze(-1).tolist()


def log_probabilities(logits_BV: torch.Tensor, tokens: list[int]) -> list[float]:
    """Natural log-probability of one token of every row, after a softmax over the whole row in float32."""
    token_B1 = torch.tensor(tokens, device=logits_BV.device)[:, None]
    logits_BV = logits_BV.float()
    return (logits_BV.gather(-1, token_B1).squeeze(-1) - logits_BV.logsumexp(-1)).tolist()
