"""Sampling of text and images from prompts, many sequences at a time.

Shape suffixes: B sequences, V vocabulary.
"""

from __future__ import annotations

import torch

from megatron_gemini.contracts import RowFormat, TokenLayout
from megatron_gemini.data.packing.pack import pack
from megatron_gemini.data.samples.document import Document
from megatron_gemini.generation.choose import choose
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


@torch.inference_mode()
def generate(
    model: Gemini,
    layout: TokenLayout,
    documents: list[Document],
    settings: SampleSettings,
    codes_per_image: int,
    seeds: list[int] | None = None,
) -> list[list[int]]:
    """The answer to every open document, as token ids without the closing eos.

    documents: open behind `model`, or anywhere else; each ends in a causal token.
    codes_per_image: codes between image_begin and image_end; 0 for a model that draws no images.
    seeds: of each sequence (settings.seed + i when None). A sequence's answer depends on its own document and seed
        only, whatever else is in the batch (to the rounding of the arithmetic).
    With guidance other than 1, each sequence has a twin with the empty prompt and the same answer, and image codes are
    drawn from twin + guidance * (prompted - twin) (Ho & Salimans 2022).
    """
    if not documents:
        return []
    size = len(documents)
    grammar = Grammar(layout, codes_per_image, settings.answer, settings.max_tokens, size)
    guided = settings.guidance != 1 and grammar.draws
    sequences = _sequences(model, layout, documents, settings, guided)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds or range(settings.seed, settings.seed + size)]
    answers: list[list[int]] = [[] for _ in documents]
    alive = list(range(size))
    logits_BV = sequences.start()
    while True:
        if guided:
            logits_BV = guide(logits_BV, grammar.in_image(), settings.guidance)
        logits_BV = logits_BV.masked_fill(~grammar.allowed().to(logits_BV.device), float("-inf"))
        tokens = choose(logits_BV, settings.temperature, settings.top_k, settings.top_p, generators)
        finished = grammar.advance(tokens)
        for sequence, token in zip(alive, tokens, strict=True):
            answers[sequence].append(token)
        rows = [row for row, done in enumerate(finished) if not done]
        if not rows:
            return [_without_eos(answer, layout.control("eos")) for answer in answers]
        if len(rows) < len(alive):
            twins = [row + len(alive) for row in rows] if guided else []
            sequences.keep(rows + twins)
            grammar.keep(rows)
            alive, tokens = [alive[row] for row in rows], [tokens[row] for row in rows]
            generators = [generators[row] for row in rows]
        logits_BV = sequences.append(tokens * 2 if guided else tokens)


def guide(logits_BV: torch.Tensor, in_image: list[bool], guidance: float) -> torch.Tensor:
    """Rows of prompted sequences, then of their twins -> rows of the prompted ones, guided where an image is drawn."""
    prompted_BV, twin_BV = logits_BV.chunk(2)
    guided_BV = twin_BV + guidance * (prompted_BV - twin_BV)
    drawing_B = torch.tensor(in_image, device=logits_BV.device)
    return torch.where(drawing_B[:, None], guided_BV, prompted_BV)


def _sequences(
    model: Gemini, layout: TokenLayout, documents: list[Document], settings: SampleSettings, guided: bool
) -> Sequences:
    prompts = pack(documents, sum(map(len, documents)), RowFormat())
    if guided:
        prompts = concatenate(prompts, empty_prompts(layout, len(documents)))
    prompts = prompts.to(next(model.parameters()).device)
    if settings.cache:
        return CachedSequences(model, prompts, settings.max_tokens)
    return RecomputedSequences(model, prompts)


def _without_eos(answer: list[int], eos: int) -> list[int]:
    return answer[:-1] if answer[-1] == eos else answer
