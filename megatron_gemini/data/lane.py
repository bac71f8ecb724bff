"""A lane: one endless, deterministic stream of packed rows.

Lane i of L takes the positions i, i + L, i + 2L, ... of every source's endless sequence of epochs, so over all lanes
each sample is drawn exactly once an epoch, whichever ranks the lanes run on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from megatron_gemini.config.training import LossConfig
from megatron_gemini.contracts import Batch
from megatron_gemini.data.document import Document
from megatron_gemini.data.pack import best_fit, pack
from megatron_gemini.data.source import Source
from megatron_gemini.data.tasks import random_stream

Draw = Callable[[Source, int], Document | None]  # the document at a position, None (and counted) if it is bad


class Lane:
    """Draws documents from the sources by their weights and packs them, choosing among `look_ahead` of them."""

    def __init__(
        self,
        number: int,
        lanes: int,
        sources: Sequence[Source],
        draw: Draw,
        *,
        seed: int,
        row_tokens: int,
        look_ahead: int,
        loss: LossConfig,
    ) -> None:
        self.number, self.lanes, self.sources, self.draw = number, lanes, sources, draw
        self.row_tokens, self.look_ahead, self.loss = row_tokens, look_ahead, loss
        total = sum(source.weight for source in sources)
        self._shares = [source.weight / total for source in sources]
        self._phases = random_stream(seed, "mixture", number).random(len(sources))
        self._drawn = [0] * len(sources)  # positions taken of every source, good or bad
        self._waiting: list[tuple[int, int, Document]] = []  # (source, position, document), oldest first
        self._rows = 0

    def row(self) -> Batch:
        """The next packed row: the document that has waited longest, then the longest that fits, and so on."""
        chosen: list[Document] = []
        room = self.row_tokens
        while True:
            self._fill()
            place = best_fit([len(document) for *_, document in self._waiting], room) if chosen else 0
            if place is None:
                break
            chosen.append(self._waiting.pop(place)[2])
            room -= len(chosen[-1])
        self._rows += 1
        return pack(chosen, self.row_tokens, self.loss)

    def _fill(self) -> None:
        while len(self._waiting) < self.look_ahead:
            source, position = self._next()
            document = self.draw(self.sources[source], position)
            if document is not None:
                self._waiting.append((source, position, document))

    def _next(self) -> tuple[int, int]:
        """(source, position) of the next draw: the source that is furthest behind its share of this lane's draws.

        Shares hold to within a document or so at any time; random phases keep the lanes from drawing in step.
        """
        draws = sum(self._drawn) + 1
        behind = [
            share * draws + phase - drawn
            for share, phase, drawn in zip(self._shares, self._phases, self._drawn, strict=True)
        ]
        source = behind.index(max(behind))
        position = self.number + self.lanes * self._drawn[source]
        self._drawn[source] += 1
        return source, position

    def state(self) -> dict[str, Any]:
        """What `load_state` needs to go on with the same rows; plain numbers and strings."""
        return {
            "rows": self._rows,
            "drawn": {source.label: drawn for source, drawn in zip(self.sources, self._drawn, strict=True)},
            "samples": {source.label: len(source) for source in self.sources},
            "waiting": [[self.sources[source].label, position] for source, position, _ in self._waiting],
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken. Raises ValueError if the sources are not the same."""
        now = {source.label: len(source) for source in self.sources}
        if state["samples"] != now:
            raise ValueError(
                f"the data sources have changed: the checkpoint had {_listed(state['samples'])}, now there are "
                f"{_listed(now)}; restore the data, or start anew with train.resume false or another train.output_dir"
            )
        numbers = {source.label: number for number, source in enumerate(self.sources)}
        self._rows = state["rows"]
        self._drawn = [state["drawn"][source.label] for source in self.sources]
        self._waiting = []
        for label, position in state["waiting"]:
            document = self.sources[numbers[label]].document(position)
            self._waiting.append((numbers[label], position, document))


def _listed(samples: dict[str, int]) -> str:
    return ", ".join(f"{label} ({count} samples)" for label, count in sorted(samples.items()))
