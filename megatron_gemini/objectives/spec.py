"""What an objective is, for configuration, data, workers and planner: importable without torch and DeepSpeed.

The half above the engine, the loss and the figures, is an `objectives.base.Objective`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, Literal, TypeVar

from megatron_gemini.contracts import RowFormat

if TYPE_CHECKING:
    import torch

    from megatron_gemini.config.model import ModelConfig
    from megatron_gemini.config.run import RunConfig
    from megatron_gemini.objectives.base import Objective
    from megatron_gemini.parallel.topology import Topology

Settings = TypeVar("Settings")


@dataclass(frozen=True)
class RoleSize:
    """A model beside the policy as the planner counts it, of which the objective makes an `engine.roles.RoleSpec`.

    name, place, trained, zero_stage: as there. decoder: the sizes of its decoder, with the run's vocabulary and readers
        of memories; None where it has none, which is for the place "last" alone. One in a pipeline has no fewer layers
        than the policy, whose layers decide how many stages are legal.
    head: parameters that its last stage has beside a decoder, on one tensor-parallel rank.
    """

    name: str
    place: Literal["pipeline", "last"] = "pipeline"
    trained: bool = False
    zero_stage: int | None = None
    decoder: ModelConfig | None = None
    head: int = 0

    def __post_init__(self) -> None:
        assert self.decoder is not None or self.place == "last", f"{self.name}: no decoder to divide over a pipeline"


@dataclass(frozen=True)
class ObjectiveSpec(Generic[Settings]):
    """What a run optimizes.

    section: the dataclass of its settings, a `config.objective.ObjectiveConfig`.
    rows: settings -> what it wants of packed rows; None for one that does not train on packed rows.
    per_step: (setting's name, its value) of a global step's size, which the data-parallel ranks share.
    data_parallel_only: its model is small, and is whole on every rank.
    loss_bytes: (settings, model, tokens of a row on a context rank, bytes of an element) -> what autograd keeps of one
        row for its loss. The planner itself counts the final norm and a head with the next token's loss.
    roles: (settings, run) -> the models that it makes beside the policy, for the planner.
    build: the half above the engine.
    """

    name: str
    section: type[Settings]
    rows: Callable[[Settings], RowFormat] | None
    per_step: Callable[[RunConfig], tuple[str, int]]
    build: Callable[[RunConfig, Topology, torch.device], Objective]
    data_parallel_only: bool = False
    loss_bytes: Callable[[Settings, ModelConfig, int, int], float] = lambda section, model, tokens, element: 0.0
    roles: Callable[[Settings, RunConfig], Sequence[RoleSize]] = lambda section, config: ()
