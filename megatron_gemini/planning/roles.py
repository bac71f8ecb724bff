"""The roles of an objective on the ranks of a job: their stages, and how their engines keep them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from megatron_gemini.config.engine import ParallelConfig
from megatron_gemini.config.run import RunConfig
from megatron_gemini.objectives.spec import RoleSize
from megatron_gemini.planning.parameters import Stage, stages
from megatron_gemini.planning.zero_state import ZeroPlan


@dataclass(frozen=True)
class PlannedRole:
    """What one pipeline rank has of a role. stages: of its own, none on a rank without it."""

    size: RoleSize
    stages: list[Stage]
    zero: ZeroPlan


def role_stages(size: RoleSize, config: RunConfig, vocabulary: int) -> list[Stage]:
    """All stages of a role, in order; one where it lies whole beside the policy's last."""
    if size.decoder is None:
        return [Stage(range(0), first=False, last=False, parameters=size.head, largest=size.head)]
    parallel = config.parallel
    if size.place == "last":
        parallel = ParallelConfig(tensor=parallel.tensor)
    *before, last = stages(dataclasses.replace(config, model=size.decoder, parallel=parallel), vocabulary)
    largest = max(last.largest, size.head)
    return [*before, dataclasses.replace(last, parameters=last.parameters + size.head, largest=largest)]
