"""A lane: one endless, deterministic stream of packed rows.

Lane i of L takes the positions i, i + L, i + 2L, ... of every source's endless sequence of epochs, so over all lanes
each sample is drawn exactly once an epoch, whichever ranks and processes the lanes run on.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import NotRequired, TypeAlias, cast

from megatron_gemini.config.data import DataConfig
from megatron_gemini.config.schema import Plain
from megatron_gemini.contracts import Batch, RowFormat
from megatron_gemini.data.loading.mixture import Mixture, MixtureState
from megatron_gemini.data.loading.source import DocumentSource
from megatron_gemini.data.packing.pack import choose, pack, row_limits
from megatron_gemini.data.samples.document import Document
from megatron_gemini.modalities.bad_sample import BadSample

Draw: TypeAlias = Callable[["Lane", int, int], Document]
"""(lane, number of the source, position) -> the document. Raises BadSample."""
RESTORE = "restore the data, or start anew with --train.no_resume or another train.output_dir"
Quarantined: TypeAlias = tuple[str, int, str]
"""(label of the source, position, reason) of a sample that must not be tried again."""


class LaneState(MixtureState):
    """What a lane needs to go on with the same rows; as JSON, in which tuples are lists.

    rows: made so far. read: samples drawn. skipped: how many were left out, by source and reason. samples: of each
    source, to tell that the data has changed. identity: of the files of each source, in the state of one lane alone.
    waiting: (label, position) of the documents without a row, oldest first.
    """

    rows: int
    read: int
    skipped: dict[str, dict[str, int]]
    samples: dict[str, int]
    waiting: list[tuple[str, int]]
    quarantined: list[Quarantined]
    identity: NotRequired[dict[str, str]]


class Lane:
    """Draws documents from a mixture of the sources and packs them, choosing among `look_ahead` of them.

    read: samples drawn so far. skipped: how many of them could not be used, by (source, reason).
    """

    def __init__(
        self,
        number: int,
        lanes: int,
        sources: Sequence[DocumentSource],
        draw: Draw,
        *,
        seed: int,
        rows_per_step: int,
        data: DataConfig,
        form: RowFormat,
    ) -> None:
        self.number, self.sources, self.draw = number, sources, draw
        self.limits, self.look_ahead, self.form = row_limits(data), data.look_ahead, form
        self.mixture = Mixture(number, lanes, sources, data, seed=seed, rows_per_step=rows_per_step)
        self._waiting: list[tuple[int, int, Document]] = []  # (source, position, document), oldest first
        self._quarantined: dict[tuple[str, int], str] = {}
        self._rows = 0
        self.read = 0
        self.skipped: Counter[tuple[str, str]] = Counter()

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
        # The oldest goes first whatever fits: every document has its row in time, however badly its size fits others.
        chosen, room, more = [], self.limits, [0]
        while more:
            for place in reversed(more):  # from behind, so that the places of the others stay right
                chosen.append(self._waiting.pop(place)[2])
                room = room - chosen[-1].size
            self._fill()
            more = choose([document.size for *_, document in self._waiting], room)
        self._rows += 1
        return pack(chosen, self.limits.tokens, self.form)

    def _fill(self) -> None:
        while len(self._waiting) < self.look_ahead:
            drawn = self.mixture.next(self._rows)
            if drawn is None:
                return
            self.read += 1
            if self._add(*drawn):  # a bad sample is a draw, but spends nothing of a budget of tokens
                self.mixture.spend(drawn[0], len(self._waiting[-1][2]))

    def _add(self, source: int, position: int) -> bool:
        """Let the document at a position wait for its row. False, and counted with the reason, if it cannot be used."""
        label = self.sources[source].label
        reason = self._quarantined.pop((label, position), "")  # a position comes once, and is then done with
        if not reason:
            try:
                self._waiting.append((source, position, self.draw(self, source, position)))
                return True
            except BadSample as error:
                reason = error.reason
        self.skipped[label, reason] += 1
        return False

    def state(self) -> LaneState:
        skipped: dict[str, dict[str, int]] = {}
        for (label, reason), count in sorted(self.skipped.items()):
            skipped.setdefault(label, {})[reason] = count
        waiting = [[self.sources[source].label, position] for source, position, _ in self._waiting]
        quarantined = [[label, position, reason] for (label, position), reason in self._quarantined.items()]
        return LaneState(
            rows=self._rows,
            read=self.read,
            skipped=skipped,
            **self.mixture.state(),
            samples={source.label: len(source) for source in self.sources},
            waiting=cast("list[tuple[str, int]]", waiting),
            quarantined=cast("list[Quarantined]", quarantined),
        )

    def load_state(self, state: LaneState) -> None:
        """Go on where `state` was taken. Raises ValueError if the sources are not the same."""
        self.check_sources(state)
        numbers = {source.label: number for number, source in enumerate(self.sources)}
        self._rows, self.read = state["rows"], state["read"]
        self.skipped = skipped_in(state)
        self.mixture.load_state(state)
        # What crashed a worker is in the state, since a resume may be without workers, where nothing could survive it.
        self._quarantined = {(label, position): reason for label, position, reason in state["quarantined"]}
        self._waiting = []
        # Documents are not in the state: they are drawn again by their positions, which alone decide them.
        for label, position in state["waiting"]:
            self._add(numbers[label], position)

    def check_sources(self, state: LaneState) -> None:
        """Raise ValueError if the sources are not those of `state`."""
        # With other numbers of samples, every position would be another sample.
        now = {source.label: len(source) for source in self.sources}
        if state["samples"] != now:
            raise ValueError(
                f"the data sources have changed: the checkpoint had {_listed(state['samples'])}, now there are "
                f"{_listed(now)}; {RESTORE}"
            )


def checked(state: Plain) -> LaneState:
    """The state of a lane. Raises ValueError for what `Lane.state` never gives: a checkpoint may be a stranger's."""
    found = cast("LaneState", state)
    try:
        labels = found["samples"].keys()
        by_label = [found["samples"], found["drawn"], found["tokens"]]
        counts = [found["rows"], found["read"], *(count for table in by_label for count in table.values())]
        counts += [count for reasons in found["skipped"].values() for count in reasons.values()]
        named = [*found["waiting"], *((label, position) for label, position, _ in found["quarantined"])]
        good = (
            all(isinstance(each, list) for each in (found["waiting"], found["quarantined"]))
            and all(type(count) is int and count >= 0 for count in (*counts, *(position for _, position in named)))
            and all(math.isfinite(credit) for credit in found["credit"].values())
            and all(table.keys() == labels for table in by_label)
            and found["credit"].keys() == labels
            and {label for label, _ in named} <= labels
            and all(isinstance(reason, str) for *_, reason in found["quarantined"])
        )
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        good = False
    if not good:
        raise ValueError("the state of a data lane is not what this version writes; the checkpoint is damaged")
    return found


def skipped_in(state: LaneState) -> Counter[tuple[str, str]]:
    """How many samples a lane had left out when `state` was taken, by (source, reason)."""
    by_label = state["skipped"].items()
    return Counter({(label, reason): count for label, reasons in by_label for reason, count in reasons.items()})


def with_quarantined(state: LaneState, lane: int, lanes: int, quarantined: Iterable[Quarantined]) -> LaneState:
    """`state` of a lane, told of samples that must not be tried (again), as far as it has not drawn them yet."""
    waiting = {(label, position) for label, position in state["waiting"]}
    # Draw n of a lane is the position lane + n * lanes: what it has drawn, and does not wait, cannot come again.
    known = {(label, position): reason for label, position, reason in [*state["quarantined"], *quarantined]}
    ahead = [
        [label, position, reason]
        for (label, position), reason in known.items()
        if (position - lane) // lanes >= state["drawn"][label] or (label, position) in waiting
    ]
    return {**state, "quarantined": cast("list[Quarantined]", ahead)}


def _listed(samples: dict[str, int]) -> str:
    return ", ".join(f"{label} ({count} samples)" for label, count in sorted(samples.items()))
