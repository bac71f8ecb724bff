"""Runs of codes that an answer may hold: one kind for every modality whose items the model makes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_gemini.contracts import TokenLayout
from megatron_gemini.registry import MODALITIES


@dataclass(frozen=True)
class CodeRun:
    """Of one modality. begin, end: ids of the control tokens around. codes: ids. length: codes of an item."""

    modality: str
    begin: int
    codes: range
    length: int
    end: int

    @property
    def answer_tokens(self) -> int:
        """Tokens of an answer that is one item: begin, codes, end and eos."""
        return self.length + 3


def code_runs(layout: TokenLayout, lengths: Mapping[str, int]) -> tuple[CodeRun, ...]:
    """Those of a model. lengths: codes of an item by modality, of those alone that the model may make."""
    runs = []
    for spec in MODALITIES.entries():
        codes, length = layout.code_range(spec.name), lengths.get(spec.name, 0)
        if spec.codes is not None and codes and length:
            begin, end = layout.control(spec.codes.begin), layout.control(spec.codes.end)
            runs.append(CodeRun(spec.name, begin, codes, length, end))
    return tuple(runs)


def drawn_modalities() -> tuple[str, ...]:
    """Those whose codes an image tokenizer turns into images."""
    made = ((spec.name, spec.codes) for spec in MODALITIES.entries())
    return tuple(name for name, codes in made if codes is not None and codes.tokenizer)


def cannot_make(modality: str) -> str:
    """Why a model makes no items of a modality, and the way out, for messages."""
    codes = MODALITIES.get(modality).codes
    without = f", or was trained without {codes.tokenizer}" if codes is not None and codes.tokenizer else ""
    return f"this model makes no {modality}: it has no {modality} codes{without}; ask for text instead"
