"""A lane: one endless, deterministic stream of packed rows.

Lane i of L takes the positions i, i + L, i + 2L, ... of every source's endless sequence of epochs, so over all lanes
each sample is drawn exactly once an epoch, whichever ranks the lanes run on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from megatron_gemini.config.data import DataConfig
from megatron_gemini.config.training import LossConfig
from megatron_gemini.contracts import Batch
from megatron_gemini.data.document import Document, Size
from megatron_gemini.data.mixture import Mixture
from megatron_gemini.data.pack import choose, pack, row_limits
from megatron_gemini.data.source import Source

Draw = Callable[[Source, int], Document | None]  # the document at a position, None (and counted) if it is bad


class Lane:
    """Draws documents from a mixture of the sources and packs them, choosing among `look_ahead` of them."""

    def __init__(
        self,
        number: int,
        lanes: int,
        sources: Sequence[Source],
        draw: Draw,
        *,
        seed: int,
        rows_per_step: int,
        data: DataConfig,
        loss: LossConfig,
    ) -> None:
        self.number, self.sources, self.draw = number, sources, draw
        self.limits, self.look_ahead, self.loss = row_limits(data), data.look_ahead, loss
        self.mixture = Mixture(number, lanes, sources, data, seed=seed, rows_per_step=rows_per_step)
        self._waiting: list[tuple[int, int, Document]] = []  # (source, position, document), oldest first
        self._rows = 0

    def row(self) -> Batch:
        """The next packed row: the document that has waited longest, and those of the others that fill it best.

        Raises ValueError when every source is used up.
        """
        self._fill()
        if not self._waiting:
            raise ValueError(
                f"every data source is used up after {self._rows} rows of lane {self.number}; raise the epochs or "
                "tokens of data.sources, or lower train.steps"
            )
        chosen, room, more = [], self.limits, [0]
        while more:
            for place in reversed(more):
                chosen.append(self._waiting.pop(place)[2])
                room = Size(*(left - taken for left, taken in zip(room, chosen[-1].size, strict=True)))
            self._fill()
            more = choose([document.size for *_, document in self._waiting], room)
        self._rows += 1
        return pack(chosen, self.limits.tokens, self.loss)

    def _fill(self) -> None:
        while len(self._waiting) < self.look_ahead:
            drawn = self.mixture.next(self._rows)
            if drawn is None:
                return
            source, position = drawn
            document = self.draw(self.sources[source], position)
            if document is not None:
                self.mixture.spend(source, len(document))
                self._waiting.append((source, position, document))

    def state(self) -> dict[str, Any]:
        """What `load_state` needs to go on with the same rows; plain numbers and strings."""
        return {
            "rows": self._rows,
            **self.mixture.state(),
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
        self.mixture.load_state(state)
        self._waiting = []
        for label, position in state["waiting"]:
            document = self.sources[numbers[label]].document(position)
            self._waiting.append((numbers[label], position, document))


def _listed(samples: dict[str, int]) -> str:
    return ", ".join(f"{label} ({count} samples)" for label, count in sorted(samples.items()))
