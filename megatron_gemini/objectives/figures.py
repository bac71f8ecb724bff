"""Figures of packed rows that every objective on such rows logs: tokens by kind, documents by source.

Shape suffixes: T packed tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from megatron_gemini.contracts import TEXT, Batch, TokenLayout
from megatron_gemini.registry import MODALITIES

MIXTURE = ("documents/", "tokens/")


def token_kinds(layout: TokenLayout) -> tuple[str, ...]:
    """Text (with the control tokens), every range of codes as `NAME_codes`, then the modalities that have
    placeholders."""
    codes = [f"{name}_codes" for name, _ in layout.codes]
    return (TEXT, *codes, *(spec.name for spec in MODALITIES.entries() if spec.control))


def count_tokens(batches: Iterable[Batch], layout: TokenLayout) -> dict[str, int]:
    """Tokens of each of `token_kinds` in these rows, without padding. Counts of ranks may be summed."""
    counts = dict.fromkeys(token_kinds(layout), 0)
    controls = {spec.name: layout.control(spec.control) for spec in MODALITIES.entries() if spec.control}
    for batch in batches:
        # The ids are counted once: a comparison with every range would read the row again for each.
        token_T = batch.token_T[batch.segment_T != 0]
        by_id = torch.bincount(token_T, minlength=layout.size)
        ranges = {name: layout.code_range(name) for name, _ in layout.codes}
        found = {f"{name}_codes": int(by_id[ids.start : ids.stop].sum()) for name, ids in ranges.items()}
        found |= {name: int(by_id[token]) for name, token in controls.items()}
        # Control tokens that are no placeholders, such as those around an output image, count as text.
        found[TEXT] = token_T.numel() - sum(found.values())
        for kind, count in found.items():
            counts[kind] += count
    return counts


def token_shares(counts: dict[str, float]) -> dict[str, float]:
    """A record's `tokens` and `share_...` from the counts of `count_tokens`."""
    # Sums over ranks come as float64, which holds counts exactly.
    total = int(sum(counts.values()))
    return {"tokens": total, **{f"share_{kind}": int(count) / max(total, 1) for kind, count in counts.items()}}


def mixture_of(batches: Iterable[Batch], labels: Sequence[str]) -> dict[str, int]:
    """Documents and tokens of the rows by data source: what the weights, budgets and phases came to.

    A document's name begins with its source's label and a slash.
    """
    longest_first = sorted(labels, key=len, reverse=True)  # one label may be the beginning of another
    counts = {f"{kind}{label}": 0 for kind in MIXTURE for label in labels}
    for batch in batches:
        # Documents count from 1; what is in place 0 is padding.
        lengths = batch.segment_T.bincount(minlength=len(batch.samples) + 1)[1:].tolist()
        for key, length in zip(batch.samples, lengths, strict=True):
            label = next((label for label in longest_first if key.startswith(f"{label}/")), None)
            if label is not None:
                counts[f"documents/{label}"] += 1
                counts[f"tokens/{label}"] += length
    return counts
