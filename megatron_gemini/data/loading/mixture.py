"""Which source a lane draws from next: weights, budgets and a curriculum, without chance beyond one phase a source.

A lane's draws are a pure function of (seed, lane, the draws so far and their tokens), so they need no generator in the
state and are the same on any number of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol, TypedDict

from megatron_gemini.config.data import DataConfig
from megatron_gemini.data.random_stream import random_stream


class MixtureState(TypedDict):
    """By the sources' labels: positions taken, credit, tokens of the documents. JSON keeps all of it exactly."""

    drawn: dict[str, int]
    credit: dict[str, float]
    tokens: dict[str, int]


class MixtureSource(Protocol):
    """What is needed to know of a source. epochs, tokens: after which it drops out, 0 for never."""

    label: str
    weight: float
    epochs: float
    tokens: int

    def __len__(self) -> int: ...


class Mixture:
    """The draws of lane `number` of `lanes`, which takes the positions number, number + lanes, ... of every source.

    Every draw adds to each source's credit its share of the weights and takes one from the source that has the most:
    shares hold to within a document or so at any time.
    A source that is used up drops out, and the others take its share.
    """

    def __init__(
        self,
        number: int,
        lanes: int,
        sources: Sequence[MixtureSource],
        data: DataConfig,
        *,
        seed: int,
        rows_per_step: int,
    ) -> None:
        self.number, self.lanes, self.sources, self.rows_per_step = number, lanes, sources, rows_per_step
        phases = [(0, [source.weight for source in sources]), *((p.step, list(p.weights)) for p in data.curriculum)]
        self._phases = [(step, [weight ** (1 / data.temperature) for weight in weights]) for step, weights in phases]
        # Without a phase of its own every lane would draw the same source at the same time.
        self._credit = random_stream(seed, "mixture", number).random(len(sources)).tolist()
        self._drawn = [0] * len(sources)  # positions taken, good or bad
        self._tokens = [0] * len(sources)

    def next(self, row: int) -> tuple[int, int] | None:
        """(source, position) of the next draw, for this lane's row number `row`; None if every source is used up."""
        shares = self.shares(row)
        if not any(shares):
            return None
        for source, share in enumerate(shares):
            self._credit[source] += share
        chosen = max((i for i, share in enumerate(shares) if share), key=lambda i: self._credit[i])
        self._credit[chosen] -= 1.0  # as much as all of them have just got, so that the sum stays as it is
        self._drawn[chosen] += 1
        return chosen, self._position(self._drawn[chosen] - 1)

    def spend(self, source: int, tokens: int) -> None:
        """Count the tokens of a document that was drawn."""
        self._tokens[source] += tokens

    def shares(self, row: int) -> list[float]:
        """Each source's share of the draws now; 0 for one that is used up or has no weight in this phase."""
        # By the run's step and not by the lane's draws: the curriculum is the same for all lanes at any time.
        step = (self.number + self.lanes * row) // self.rows_per_step
        weights = [weights for begin, weights in self._phases if begin <= step][-1]
        left = [0.0 if self._used_up(source) else weight for source, weight in enumerate(weights)]
        total = sum(left)
        return [weight / total for weight in left] if total else left

    def _used_up(self, source: int) -> bool:
        limits = self.sources[source]
        positions = math.ceil(limits.epochs * len(limits)) if limits.epochs else math.inf
        # A budget is divided over the lanes: a lane knows its own draws only, and so is the same on any ranks.
        share = limits.tokens // self.lanes + (self.number < limits.tokens % self.lanes)
        budget = share if limits.tokens else math.inf
        return self._position(self._drawn[source]) >= positions or self._tokens[source] >= budget

    def _position(self, draw: int) -> int:
        return self.number + self.lanes * draw

    def state(self) -> MixtureState:
        labels = [source.label for source in self.sources]
        return {
            "drawn": dict(zip(labels, self._drawn, strict=True)),
            "credit": dict(zip(labels, self._credit, strict=True)),
            "tokens": dict(zip(labels, self._tokens, strict=True)),
        }

    def load_state(self, state: MixtureState) -> None:
        """Go on where `state`, of the same sources, was taken."""
        labels = [source.label for source in self.sources]
        self._drawn = [state["drawn"][label] for label in labels]
        self._credit = [state["credit"][label] for label in labels]
        self._tokens = [state["tokens"][label] for label in labels]
