"""What an objective is, for configuration, data, workers and planner: importable without torch and DeepSpeed.

The half above the engine, the loss and the figures, is an `objectives.base.Objective`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

from megatron_gemini.contracts import RowFormat

if TYPE_CHECKING:
    import torch

    from megatron_gemini.config.model import ModelConfig
    from megatron_gemini.config.run import RunConfig
    from megatron_gemini.objectives.base import Objective
    from megatron_gemini.parallel.topology import Topology

Settings = TypeVar("Settings")


@dataclass(frozen=True)
class ObjectiveSpec(Generic[Settings]):
    """What a run optimizes.

    section: the dataclass of its settings, a `config.objective.ObjectiveConfig`.
    rows: settings -> what it wants of packed rows; None for one that does not train on packed rows.
    per_step: (setting's name, its value) of a global step's size, which the data-parallel ranks share.
    data_parallel_only: its model is small, and is whole on every rank.
    loss_bytes: (settings, model, tokens of a row on a context rank, bytes of an element) -> what autograd keeps of one
        row for its loss. The planner itself counts the final norm and a head with the next token's loss.
    build: the half above the engine.
    """

    name: str
    section: type[Settings]
    rows: Callable[[Settings], RowFormat] | None
    per_step: Callable[[RunConfig], tuple[str, int]]
    build: Callable[[RunConfig, Topology, torch.device], Objective]
    data_parallel_only: bool = False
    loss_bytes: Callable[[Settings, ModelConfig, int, int], float] = lambda section, model, tokens, element: 0.0
