"""Decoding as an iterator: one token of every unfinished sequence a step, until all have ended or the caller stops.

    with Decoding(model, layout, documents, settings, runs) as decoding:
        for step in decoding:
            for sampled in step.tokens:
                ...

Shape suffixes: B sequences, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, NamedTuple

import torch

from megatron_gemini.contracts import RowFormat, TokenLayout
from megatron_gemini.data.packing.pack import pack
from megatron_gemini.data.samples.document import Document
from megatron_gemini.generation.choose import choose, guide, log_probabilities
from megatron_gemini.generation.code_runs import CodeRun
from megatron_gemini.generation.grammar import Grammar
from megatron_gemini.generation.sequences import (
    CachedSequences,
    RecomputedSequences,
    Sequences,
    concatenate,
    empty_prompts,
)
from megatron_gemini.generation.settings import SampleSettings
from megatron_gemini.models.gemini import Gemini


class Sampled(NamedTuple):
    """One token of one sequence.

    sequence: its index in the call. token: its id in the layout, eos included.
    logprob: natural log-probability of the token under the model itself. The softmax is over the whole vocabulary, of
        the prompted sequence's logits, before guidance, grammar, temperature, top-k and top-p. It is what a policy
        gradient needs, and minus it is the token's loss in training.
    finish: None while the sequence goes on; "eos", or "length" after `max_tokens` tokens.
    """

    sequence: int
    token: int
    logprob: float
    finish: Literal["eos", "length"] | None


@dataclass(frozen=True)
class Step:
    """The next token of every sequence that was unfinished, in the order of their indices."""

    tokens: tuple[Sampled, ...]


class Decoding(Iterator[Step], AbstractContextManager["Decoding"]):
    """The answers to open documents, token by token.

    documents: open behind `model`, or anywhere else; each ends in a causal token.
    runs: of codes that the model may make, as `code_runs` gives them; none for a model that only writes.
    seeds: of each sequence (settings.seed + i when None). A sequence's answer depends on its own document and seed
        only, whatever else is in the batch (to the rounding of the arithmetic).
    samples: answers to each document. Sequence i is sample i % samples of document i // samples.
    With guidance other than 1, each sequence has a twin with the empty prompt and the same answer, and codes are
    drawn from twin + guidance * (prompted - twin) (Ho & Salimans 2022).

    Keys and values of a sequence are freed before the step that ends it is returned. Those of all are freed by
    `close`, at the end of a `with`, by an error inside a step, and when the last reference to the iterator goes.
    Nothing here is safe to call from two threads at a time.

    Raises ValueError for an item asked of a model that makes none, or that does not fit into `max_tokens`.
    """

    def __init__(
        self,
        model: Gemini,
        layout: TokenLayout,
        documents: list[Document],
        settings: SampleSettings,
        runs: tuple[CodeRun, ...],
        seeds: list[int] | None = None,
        samples: int = 1,
    ) -> None:
        assert samples > 0, "no samples were asked for"
        size = len(documents) * samples
        assert seeds is None or len(seeds) == size, "every sequence has a seed of its own"
        self.live = list(range(size))
        """Indices of the sequences that are unfinished and not dropped."""
        self._size, self._model, self._layout, self._settings = size, model, layout, settings
        self._documents = {i: documents[i // samples] for i in self.live}
        self._grammar = Grammar(layout, runs, settings.answer, settings.max_tokens, size)
        self._guided = settings.guidance != 1 and bool(self._grammar.runs)
        seeds = seeds or [settings.seed + i for i in self.live]
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._last: list[int] = [0] * size
        self._sequences: Sequences | None = None

    # A decorated step, not a generator function: `with inference_mode()` around a `yield` would leave the caller's own
    # code between two steps in inference mode, where a training step fails.
    @torch.inference_mode()
    def __next__(self) -> Step:
        if not self.live:
            raise StopIteration
        try:
            step = self._sample(self._logits())
        except BaseException:
            # The traceback holds the frames, and with them the cache, for as long as somebody holds the error.
            self.close()
            raise
        self.drop([sampled.sequence for sampled in step.tokens if sampled.finish])
        return step

    @torch.inference_mode()
    def drop(self, sequences: Collection[int]) -> None:
        """Ends these sequences without a further step and frees their keys and values.

        A sequence that has ended before is passed over: who cancels an answer cannot know that it just ended.
        """
        assert all(0 <= sequence < self._size for sequence in sequences), "no such sequence"
        rows = [row for row, sequence in enumerate(self.live) if sequence not in sequences]
        if not rows:
            self.close()
        elif len(rows) < len(self.live):
            twins = [row + len(self.live) for row in rows] if self._guided else []
            if self._sequences is not None:
                self._sequences.keep(rows + twins)
            self._grammar.keep(rows)
            self.live, self._last = [self.live[row] for row in rows], [self._last[row] for row in rows]
            self._generators = [self._generators[row] for row in rows]

    def close(self) -> None:
        """Ends all sequences and frees their keys and values, also where others still refer to this object."""
        self.live = []
        self._documents = {}
        if self._sequences is not None:
            self._sequences.release()
            self._sequences = None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _logits(self) -> torch.Tensor:
        """Logits of the next token of the live sequences, then of their twins, float[B, V]."""
        if self._sequences is not None:
            return self._sequences.append(self._last * 2 if self._guided else self._last)
        # Only now, so that a sequence dropped before the first step costs nothing.
        documents = [self._documents[sequence] for sequence in self.live]
        prompts = pack(documents, sum(map(len, documents)), RowFormat())
        if self._guided:
            prompts = concatenate(prompts, empty_prompts(self._layout, len(documents)))
        prompts = prompts.to(next(self._model.parameters()).device)
        # The cache keeps keys and values of the stream. A later token would find no memory beside them to read.
        if self._settings.cache and not self._model.reads_memories:
            self._sequences = CachedSequences(self._model, prompts, self._settings.max_tokens)
        else:
            self._sequences = RecomputedSequences(self._model, prompts)
        return self._sequences.start()

    def _sample(self, logits_BV: torch.Tensor) -> Step:
        settings, grammar = self._settings, self._grammar
        model_BV = logits_BV[: len(self.live)]
        if self._guided:
            logits_BV = guide(logits_BV, grammar.in_codes(), settings.guidance)
        logits_BV = logits_BV.masked_fill(~grammar.allowed().to(logits_BV.device), float("-inf"))
        self._last = choose(logits_BV, settings.temperature, settings.top_k, settings.top_p, self._generators)
        eos = self._layout.control("eos")
        columns = (self.live, self._last, log_probabilities(model_BV, self._last), grammar.advance(self._last))
        return Step(
            tuple(
                Sampled(sequence, token, logprob, ("eos" if token == eos else "length") if ended else None)
                for sequence, token, logprob, ended in zip(*columns, strict=True)
            )
        )
