"""The loader: packed rows for every step, the same on any number of ranks and workers, resumable to the sample."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections import Counter
from collections.abc import Mapping
from contextlib import AbstractContextManager
from types import TracebackType
from typing import TypeAlias, cast

from megatron_gemini.config.run import RunConfig
from megatron_gemini.config.schema import Plain
from megatron_gemini.contracts import Batch, RowFormat, TokenLayout
from megatron_gemini.data.loading.lane import RESTORE, LaneState, checked, skipped_in, with_quarantined
from megatron_gemini.data.loading.prefetch import Prefetch
from megatron_gemini.data.loading.reader import LaneReader, make_sources
from megatron_gemini.data.loading.workers import Lanes, WorkerPool
from megatron_gemini.data.packing.wire import pinned
from megatron_gemini.data.samples.document import Encodes
from megatron_gemini.data.sources.identity import files_identity

logger = logging.getLogger(__name__)
FIRST = "0"
"""The lane whose state has the identity of the files."""
Step: TypeAlias = tuple[dict[int, Batch], dict[str, LaneState]]
"""This rank's rows by number, and the states of its lanes after them."""


def lanes_of(rank: int, ranks: int, lanes: int) -> range:
    """The lanes that a rank reads: their numbers mod ranks, or spread over all ranks where these are more."""
    if lanes >= ranks:
        return range(rank, lanes, ranks)
    # Few lanes are spread over all nodes, whose ranks are neighbors: the first ranks alone would read on one machine.
    first, after = -(-rank * lanes // ranks), -(-(rank + 1) * lanes // ranks)
    return range(first, after)


class Loader(AbstractContextManager["Loader"]):
    """Rows of global step s are the rows s*R .. s*R + R-1 (R = train.rows_per_step) of one endless sequence.

    Row n comes from lane n mod data.lanes. Each lane belongs to one rank of the job, whatever the layout, so that no
    sample is read or decoded twice. Neither the rows nor their order depend on the ranks, nor on the processes that
    data.workers gives each of them. A rank runs only its own lanes.

    sources: of the lanes. pin: rows in page-locked memory, for a GPU.
    Raises ValueError for missing or unusable shards and, after 200 samples, for more than data.max_bad_share bad ones.
    """

    def __init__(
        self,
        config: RunConfig,
        rank: int,
        ranks: int,
        layout: TokenLayout,
        tokenizer: Encodes,
        form: RowFormat,
        pin: bool = False,
    ) -> None:
        """rank, ranks: which of how many readers this is. form: what the objective wants of rows."""
        data = config.data
        if not data.sources:
            raise ValueError("data.sources is empty; name at least one set of shards")
        self._config, self._layout, self._tokenizer, self._form, self._pin = config, layout, tokenizer, form, pin
        self._rows, self._first_row = config.train.rows_per_step, 0
        # With workers, this process reads only what it checks: the cache's memory is theirs.
        self.sources = make_sources(config, layout, tokenizer, 0 if data.workers else data.cache_bytes)
        # Before any thread or process starts: what is wrong with a path or a field ends the run at once.
        for source in self.sources:
            source.check_shards()
        self._of_shards = self._report_shards() if rank == 0 else Counter()  # every rank sees all shards
        self._reader = LaneReader(config, self.sources, lanes_of(rank, ranks, data.lanes), form)
        self._pool: WorkerPool | None = None
        self._ahead: Prefetch[Step] | None = None
        self._begin(self._reader.states())

    @classmethod
    def validation(
        cls, config: RunConfig, rank: int, ranks: int, layout: TokenLayout, tokenizer: Encodes, form: RowFormat
    ) -> Loader:
        """A loader of data.validation, whose every step is train.validation_rows rows and whose prompts are never
        empty.

        Its first `next()` gives this rank's share of the rows of the validation loss, the same ones in every run.
        """
        if not config.data.validation:
            raise ValueError(
                "data.validation is empty; name the shards of the validation loss or leave validation_every 0"
            )
        # As many lanes as rows, each asked once: any number of ranks then reads the same rows without reading ahead.
        rows = config.train.validation_rows
        data = dataclasses.replace(
            config.data,
            sources=config.data.validation,
            curriculum=(),
            caption_dropout=0.0,
            prefetch=0,
            workers=0,
            lanes=rows,
            cache_bytes=0,
        )
        train = dataclasses.replace(config.train, rows_per_step=rows)
        return cls(dataclasses.replace(config, data=data, train=train), rank, ranks, layout, tokenizer, form)

    def next(self) -> dict[int, Batch]:
        """The rows of the next global step that come from this rank's lanes, by their number in the step, ascending.

        There may be none: a rank has no lane when there are fewer of them than ranks.
        """
        if self._ahead is None:
            self._ahead = self._start()
        batches, self._handed_out = self._ahead.next()
        return batches

    def state(self) -> dict[str, Plain]:
        """State of this rank's lanes after the rows handed out so far, by lane number as a string; fit for JSON.

        It names the samples that workers have given up since, so that whoever goes on from it does not try them.
        """
        lanes, quarantined = self._config.data.lanes, self._lanes.quarantined
        states = {
            number: with_quarantined(state, int(number), lanes, quarantined.get(int(number), []))
            for number, state in self._handed_out.items()
        }
        if FIRST in states:  # one rank looks at the files, and one lane says what they are
            states[FIRST] = {**states[FIRST], "identity": self._identities}
        return cast("dict[str, Plain]", states)

    @functools.cached_property
    def _identities(self) -> dict[str, str]:
        return {source.label: files_identity(source.shards.paths) for source in self.sources}

    def _check_files(self, state: LaneState) -> None:
        """Raise ValueError where as many other samples have taken the place of those of `state`."""
        now, before = self._identities, state.get("identity")
        if not isinstance(before, dict):
            raise ValueError("the checkpoint does not say which files its data came from; it is damaged")
        changed = [label for label, identity in now.items() if before.get(label) != identity]
        if changed:
            raise ValueError(
                f"the data sources have changed: the files of {', '.join(changed)} are as many samples, and others by "
                f"name, size or content; {RESTORE}"
            )

    def load_state(self, states: Mapping[str, Plain]) -> None:
        """Go on where the states of all lanes (the union over all ranks) were taken, also on other numbers of ranks.

        Raises ValueError when a lane is missing or the sources, lanes or rows_per_step are not the same.
        """
        count, lanes = self._config.data.lanes, {number: checked(state) for number, state in states.items()}
        if set(lanes) != {str(number) for number in range(count)}:
            raise ValueError(f"the checkpoint has {len(lanes)} data lanes, not {count}; keep data.lanes {len(lanes)}")
        # The lanes' rows add up to the run's, and say where it goes on: between two steps, and nowhere else.
        rows = sum(state["rows"] for state in lanes.values())
        if rows % self._rows:
            raise ValueError(
                f"the checkpoint was made after {rows} rows, which train.rows_per_step ({self._rows}) does not divide; "
                "keep train.rows_per_step as it was"
            )
        self.close()
        mine = {str(number): lanes[str(number)] for number in self._reader.lanes}
        if self._config.data.workers:  # which take the states; this process would decode all that waits in vain
            for number, lane in self._reader.lanes.items():
                lane.check_sources(mine[str(number)])
        else:
            self._reader.load_states(mine)
        if FIRST in mine:
            self._check_files(mine[FIRST])
        self._first_row = rows
        self._begin(mine)

    def _begin(self, states: dict[str, LaneState]) -> None:
        """states: of this rank's lanes, which the next rows begin from."""
        self._handed_out, self._lanes = states, Lanes(dict(states))
        self._ahead = None

    def _start(self) -> Prefetch[Step]:
        """Begin to read: not before the first row is wanted, as the run may be one that first goes on elsewhere."""
        config = self._config
        if config.data.workers and self._reader.lanes:
            self._pool = WorkerPool(
                config, self._layout, self._tokenizer, self._form, self._lanes, self._first_row, self._pin
            )
        return Prefetch(self._make, config.data.prefetch)

    def close(self) -> None:
        """Stop reading ahead and end the workers. Safe to call twice."""
        # In this order: the thread that reads ahead waits for the pool, whose processes wait for nobody.
        if self._pool is not None:
            self._pool.interrupt()
        if self._ahead is not None:
            self._ahead.close()
        if self._pool is not None:
            self._pool.close()
            self._pool = None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _make(self) -> Step:
        """One step's rows of this rank, and the state after them."""
        batches = {}
        for number in range(self._rows):
            row = self._first_row + number
            lane = row % self._config.data.lanes
            if lane not in self._reader.lanes:
                continue
            batch, state = self._pool.row(row) if self._pool else self._reader.row(row)
            self._lanes.states[str(lane)] = state
            # Workers' rows have arrived in such memory already.
            batches[number] = pinned(batch) if self._pin and not self._pool else batch
        self._first_row += self._rows
        return batches, dict(self._lanes.states)

    @property
    def skipped(self) -> Counter[tuple[str, str]]:
        """Number of samples skipped by this rank's lanes until the rows handed out last, since the beginning of the
        run, and on rank 0 of members of tars, by (source, reason)."""
        total = Counter(self._of_shards)
        for state in self._handed_out.values():
            total.update(skipped_in(state))
        return total

    def _report_shards(self) -> Counter[tuple[str, str]]:
        """Members that the tars' indices left out, after a warning for each damaged shard and for unread fields."""
        found: Counter[tuple[str, str]] = Counter()
        for source in self.sources:
            for reason, count in source.shards.rejected.items():
                found[source.label, reason] += count
            if unread := source.unread_fields():
                logger.warning("%s: nothing reads the fields %s of its records", source.label, ", ".join(unread)[:200])
            for path, damage in source.shards.damage.items():
                logger.warning("%s: the shard %r is damaged (%s); reading what is whole", source.label, path, damage)
        return found
