"""Where a run is, as a checkpoint has it beside the weights."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from megatron_gemini.checkpoint.index import RunId
from megatron_gemini.engine.settings import Json, JsonObject

_STATE = ("step", "tokens", "seconds", "optimizer_steps", "moments_since")


@dataclass
class RunState:
    """Where a run is.

    step: updates made. data: state of every data lane by its number. moments_since: optimizer_steps at which Adam's
    moments of a parameter began, of those that were frozen before. run: of this start of it. told: by `load`.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    optimizer_steps: int = 0  # fewer than `step` where a norm was not finite; Adam's bias correction needs this count
    moments_since: dict[str, int] = field(default_factory=dict)
    data: dict[str, Json] = field(default_factory=dict)
    told: list[str] = field(default_factory=list)
    run: RunId = field(default_factory=RunId)

    def to_json(self) -> JsonObject:
        """All but what each rank writes for itself, and what is of this start of the run alone."""
        return {name: getattr(self, name) for name in _STATE}


def read_progress(directory: Path) -> RunState:
    """Where the run was when it was saved, with the states of all data lanes."""
    try:
        state = json.loads((directory / "state.json").read_text())
        data: dict[str, Json] = {}
        for description in sorted(directory.glob("rank-*.json")):
            data.update(json.loads(description.read_text())["data"])
        if state.keys() != set(_STATE):
            raise ValueError("state.json has other names than this version writes")
        found = RunState(**state, data=data)
        counts = {name: getattr(found, name) for name in ("step", "tokens", "optimizer_steps")}
        for name, value in (counts | dict(found.moments_since)).items():
            _check_count(name, value)
        found.seconds = float(found.seconds)
        return found
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{directory} has no readable state: {error}") from error


def _check_count(name: str, value: Json) -> None:
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise ValueError(f"{name} is {value!r}")
