"""Character and word error rates: edits that turn the answers into the right texts, over the right texts' length.

    rate = sum_i levenshtein(said_i, right_i) / sum_i length(right_i)

Both count over all answers together, as speech recognition does, so that a long text weighs more than a short one. The
texts are compared without case, surplus spaces and closing marks. A rate may exceed 1 where a model says too much.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np

from megatron_gemini.evaluation.metrics.inputs import Texts, normalized
from megatron_gemini.evaluation.metrics.spec import MetricSpec


def levenshtein(first: Sequence[Hashable], second: Sequence[Hashable]) -> int:
    """Fewest insertions, deletions and substitutions between two sequences (Levenshtein 1966).

    d[i, j] = min(d[i-1, j] + 1, d[i, j-1] + 1, d[i-1, j-1] + (first[i] != second[j])), a row i at a time.
    """
    numbers = {symbol: number for number, symbol in enumerate({*first, *second})}
    column = np.array([numbers[symbol] for symbol in second], dtype=np.int64)
    place = np.arange(len(second) + 1)
    row = place
    for above, symbol in enumerate(first, 1):
        best = np.concatenate([[above], np.minimum(row[1:] + 1, row[:-1] + (column != numbers[symbol]))])
        # d[i, j-1] + 1 makes every value depend on the one before it: d[j] = min over k <= j of best[k] + j - k. Taking
        # j from both sides leaves a running minimum, which numpy has; a loop in Python over j is far slower.
        row = np.minimum.accumulate(best - place) + place
    return int(row[-1])


def character_error_rate(texts: Texts) -> float:
    """Edits of characters over characters of the right texts, spaces included."""
    return _rate([(normalized(a), normalized(b)) for a, b in zip(texts.said, texts.right, strict=True)])


def word_error_rate(texts: Texts) -> float:
    """Edits of words over words of the right texts; a word is what stands between spaces."""
    return _rate([(normalized(a).split(), normalized(b).split()) for a, b in zip(texts.said, texts.right, strict=True)])


def _rate(pairs: Sequence[tuple[Sequence[str], Sequence[str]]]) -> float:
    # One quotient of two sums, and no mean of quotients: an empty right text would have none.
    length = sum(len(right) for _, right in pairs)
    return sum(levenshtein(said, right) for said, right in pairs) / length if length else float("nan")


CER = MetricSpec("cer", Texts, character_error_rate, "lower", "{:.1%}", "character errors per right character")
WER = MetricSpec("wer", Texts, word_error_rate, "lower", "{:.1%}", "word errors per right word")
