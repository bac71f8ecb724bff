"""B sequences under generation: the next token's logits, with kept keys and values or computed afresh.

Shape suffixes: T packed tokens, B sequences, D model width, V vocabulary, O encoder output embeddings.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Protocol

import torch

from megatron_gemini.contracts import Batch, Media, TokenLayout
from megatron_gemini.generation.cache import KVCache
from megatron_gemini.models.gemini import Gemini


class Sequences(Protocol):
    """What sampling needs to know of a batch of growing sequences."""

    def start(self) -> torch.Tensor:
        """Logits of the first new token, float[B, V]."""
        ...

    def append(self, tokens: list[int]) -> torch.Tensor:
        """Adds one token to every sequence; logits of the next, float[B, V]."""
        ...

    def keep(self, rows: list[int]) -> None:
        """Drops all sequences but these rows, in this order."""
        ...

    def release(self) -> None:
        """Frees what was kept; nothing else may be called afterwards."""
        ...


class CachedSequences:
    """One pass over the prompts, then one token per sequence and pass; not for a model whose layers read memories."""

    def __init__(self, model: Gemini, prompts: Batch, new_tokens: int) -> None:
        assert not model.reads_memories, "the row of a later token has no memory that its layers could read"
        self.model, self.prompts = model, prompts
        self.cache = KVCache(prompt_lengths(prompts), new_tokens)

    def start(self) -> torch.Tensor:
        h_TD = self._pass(self.prompts)
        # Only the last token of every prompt has a successor to choose: logits of all would be [T, V].
        return self.model.logits(h_TD[self.cache.length_B.cumsum(0) - 1])

    def append(self, tokens: list[int]) -> torch.Tensor:
        position_T = self.cache.length_B  # positions continue the prompt's
        token_T = torch.tensor(tokens, device=position_T.device)
        return self.model.logits(self._pass(_causal_row(token_T, position_T)))

    def keep(self, rows: list[int]) -> None:
        self.cache.keep(torch.tensor(rows, device=self.cache.length_B.device))

    def release(self) -> None:
        self.cache.release()

    def _pass(self, batch: Batch) -> torch.Tensor:
        h_TD = self.model.hidden(batch, cache=self.cache)
        self.cache.advance()
        return h_TD


class RecomputedSequences:
    """Every pass is the whole sequences: for models that read memories, and to check on `CachedSequences`."""

    def __init__(self, model: Gemini, prompts: Batch) -> None:
        self.model, self.prompts = model, prompts
        self.rows = list(range(len(prompt_lengths(prompts))))
        self.new: list[list[int]] = [[] for _ in self.rows]

    def start(self) -> torch.Tensor:
        batch = extend(self.prompts, self.new)
        # Rows that were dropped are computed along: without one, the media of all documents behind it would move.
        last = torch.tensor(prompt_lengths(batch), device=batch.token_T.device).cumsum(0) - 1
        return self.model.logits(self.model.hidden(batch)[last[self.rows]])

    def append(self, tokens: list[int]) -> torch.Tensor:
        for row, token in zip(self.rows, tokens, strict=True):
            self.new[row].append(token)
        return self.start()

    def keep(self, rows: list[int]) -> None:
        self.rows = [self.rows[row] for row in rows]

    def release(self) -> None:
        self.rows, self.new = [], []


def prompt_lengths(batch: Batch) -> list[int]:
    """Tokens of every document of a row without padding."""
    lengths: list[int] = batch.segment_T.unique_consecutive(return_counts=True)[1].tolist()
    return lengths


def empty_prompts(layout: TokenLayout, sequences: int) -> Batch:
    """A row of so many documents open behind an empty prompt: what caption dropout trains on."""
    opening = [layout.control(name) for name in ("bos", "user", "model")]
    first = _causal_row(torch.tensor(opening[:1] * sequences), torch.zeros(sequences, dtype=torch.int64))
    return extend(first, [opening[1:]] * sequences)


def concatenate(first: Batch, second: Batch) -> Batch:
    """The documents of `first`, then those of `second`, which has no media; neither has padding."""
    assert not second.media
    row = {name: torch.cat([getattr(first, name), getattr(second, name)]) for name in _TOKEN_FIELDS}
    row["segment_T"][len(first.token_T) :] += first.segment_T[-1]
    return _row(row, first.media, first.samples + second.samples)


def extend(batch: Batch, new: list[list[int]]) -> Batch:
    """The row with the causal tokens `new[b]` behind document b; placeholders move along with their documents."""
    device = batch.token_T.device
    lengths = prompt_lengths(batch)
    added = [len(tokens) for tokens in new]
    documents = zip(*(getattr(batch, name).split(lengths) for name in _TOKEN_FIELDS), strict=True)
    grown = []
    for number, (length, fields) in enumerate(zip(lengths, documents, strict=True)):
        token_T = torch.tensor(new[number], dtype=torch.int64, device=device)
        tail = _causal_row(token_T, torch.arange(length, length + added[number], device=device))
        tail.segment_T.fill_(number + 1)
        grown.append([torch.cat([x, getattr(tail, name)]) for name, x in zip(_TOKEN_FIELDS, fields, strict=True)])
    row = {name: torch.cat(parts) for name, parts in zip(_TOKEN_FIELDS, zip(*grown, strict=True), strict=True)}
    shift_B = torch.tensor([0, *added[:-1]], device=device).cumsum(0)
    media = {
        name: dataclasses.replace(item, token_O=item.token_O + shift_B[batch.segment_T[item.token_O].long() - 1])
        for name, item in batch.media.items()
    }
    return _row(row, media, batch.samples)


_TOKEN_FIELDS = tuple(f.name for f in dataclasses.fields(Batch) if f.name.endswith("_T"))


def _row(tokens: Mapping[str, torch.Tensor], media: dict[str, Media], samples: list[str]) -> Batch:
    """A row of these columns; those of an objective are not generated."""
    token, target, weight, position, segment, span, modality = (tokens[name] for name in _TOKEN_FIELDS)
    return Batch(token, target, weight, position, segment, span, modality, media=media, samples=samples)


def _causal_row(token_T: torch.Tensor, position_T: torch.Tensor) -> Batch:
    """One token a document, causal, without loss."""
    size, device = len(token_T), token_T.device
    zero_T = torch.zeros(size, dtype=torch.int32, device=device)
    return Batch(
        token_T=token_T,
        target_T=torch.zeros_like(token_T),
        weight_T=torch.zeros(size, device=device),
        position_T=position_T,
        segment_T=torch.arange(1, size + 1, dtype=torch.int32, device=device),
        span_T=zero_T,
        modality_T=torch.zeros(size, dtype=torch.int8, device=device),
    )
