"""Answers to many prompts at once, whole."""

from __future__ import annotations

from megatron_gemini.contracts import TokenLayout
from megatron_gemini.data.samples.document import Document
from megatron_gemini.generation.code_runs import CodeRun
from megatron_gemini.generation.settings import SampleSettings
from megatron_gemini.generation.steps import Decoding
from megatron_gemini.models.gemini import Gemini


def generate(
    model: Gemini,
    layout: TokenLayout,
    documents: list[Document],
    settings: SampleSettings,
    runs: tuple[CodeRun, ...],
    seeds: list[int] | None = None,
) -> list[list[int]]:
    """The answer to every open document, as token ids without the closing eos. Arguments are those of `Decoding`."""
    answers: list[list[int]] = [[] for _ in documents]
    with Decoding(model, layout, documents, settings, runs, seeds) as decoding:
        for step in decoding:
            for sampled in step.tokens:
                if sampled.finish != "eos":
                    answers[sampled.sequence].append(sampled.token)
    return answers
