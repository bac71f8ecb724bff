"""What a run optimizes. Each objective has its own settings, in its folder below `objectives/`; these all have."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ObjectiveConfig:
    """What every objective has."""

    kind: str = "pretrain"
    """Name of the objective, see `megatron_gemini/registry.py`."""
