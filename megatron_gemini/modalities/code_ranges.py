"""The ranges of codes that a run's vocabulary has: one of every modality whose items the model can make."""

from __future__ import annotations

from megatron_gemini.config.run import RunConfig
from megatron_gemini.registry import MODALITIES


def code_ranges(config: RunConfig) -> tuple[tuple[str, int], ...]:
    """(modality, number of codes) of every range, as `contracts.TokenLayout` takes them: those of plugins behind."""
    made = [(spec.name, spec.codes) for spec in MODALITIES.entries() if spec.codes is not None]
    return tuple((name, codes.size(config)) for name, codes in made)
