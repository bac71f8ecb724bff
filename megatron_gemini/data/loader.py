"""The loader: packed rows for every step, the same on any number of ranks, resumable to the sample."""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from megatron_gemini.config.check import divides
from megatron_gemini.config.run import RunConfig
from megatron_gemini.contracts import Batch, TokenLayout
from megatron_gemini.data.document import Document, Encodes
from megatron_gemini.data.lane import Lane
from megatron_gemini.data.prefetch import Prefetch
from megatron_gemini.data.source import Cache, Source, source_labels
from megatron_gemini.modalities.bad_sample import BadSample

logger = logging.getLogger(__name__)
FIRST_SAMPLES = 200  # before the share of bad ones is judged


class Loader:
    """Rows of global step s are the rows s*R .. s*R + R-1 (R = train.rows_per_step) of one endless sequence.

    Row n comes from lane n mod data.lanes and goes to data-parallel rank n mod data_size. So each lane belongs to one
    rank, and neither the rows nor their order depend on the ranks. A rank runs only its own lanes.

    skipped: number of samples left out by this rank, and on rank 0 of members of tars, by (source, reason).
    Raises ValueError for sizes that do not divide, missing or unusable shards, and, after 200 samples, for more than
    data.max_bad_share bad ones.
    """

    def __init__(
        self, config: RunConfig, data_rank: int, data_size: int, layout: TokenLayout, tokenizer: Encodes
    ) -> None:
        data, rows = config.data, config.train.rows_per_step
        if not data.sources:
            raise ValueError("data.sources is empty; name at least one set of shards")
        divides(data_size, rows, f"{data_size} data-parallel ranks", "train.rows_per_step")
        divides(data_size, data.lanes, f"{data_size} data-parallel ranks", "data.lanes")
        self.skipped: Counter[tuple[str, str]] = Counter()
        self._read = self._bad = 0
        self._config, self._rows, self._rank, self._size = config, rows, data_rank, data_size
        self._first_row = data_rank
        cache = Cache(data.cache_bytes)
        self.sources = [
            Source(source, label, config, layout, tokenizer, cache, data.caption_dropout)
            for source, label in zip(data.sources, source_labels(data.sources), strict=True)
        ]
        if data_rank == 0:  # every rank sees all shards
            self._report_shards()
        self._lanes = {
            number: Lane(
                number,
                data.lanes,
                self.sources,
                self._draw,
                seed=config.train.seed,
                rows_per_step=rows,
                data=data,
                loss=config.loss,
            )
            for number in range(data_rank, data.lanes, data_size)
        }
        self._handed_out = self._lane_states()
        self._ahead = Prefetch(self._make, data.prefetch)

    @classmethod
    def held_out(
        cls, config: RunConfig, data_rank: int, data_size: int, layout: TokenLayout, tokenizer: Encodes
    ) -> Loader:
        """A loader of data.held_out, whose every step is train.held_out_rows rows and whose prompts are never empty.

        Its first `next()` gives this rank's share of the rows of the held-out loss, the same ones in every run.
        """
        if not config.data.held_out:
            raise ValueError("data.held_out is empty; name the shards of the held-out loss or leave held_out_every 0")
        rows = config.train.held_out_rows
        divides(data_size, rows, f"{data_size} data-parallel ranks", "train.held_out_rows")
        data = dataclasses.replace(
            config.data,
            sources=config.data.held_out,
            curriculum=(),
            caption_dropout=0.0,
            prefetch=0,
            lanes=rows,
            cache_bytes=0,
        )
        train = dataclasses.replace(config.train, rows_per_step=rows)
        return cls(dataclasses.replace(config, data=data, train=train), data_rank, data_size, layout, tokenizer)

    def next(self) -> list[Batch]:
        """This rank's rows of the next global step, rows_per_step / data_size of them, in the order of the rows."""
        batches, self._handed_out = self._ahead.next()
        return batches

    def state(self) -> dict[str, Any]:
        """State of this rank's lanes after the rows handed out so far, by lane number as a string; fit for JSON."""
        return self._handed_out

    def load_state(self, lanes: Mapping[str, Any]) -> None:
        """Go on where the states of all lanes (the union over all ranks) were taken, also on other numbers of ranks.

        Raises ValueError when a lane is missing or the sources, lanes or rows_per_step are not the same.
        """
        count = self._config.data.lanes
        if set(lanes) != {str(number) for number in range(count)}:
            raise ValueError(f"the checkpoint has {len(lanes)} data lanes, not {count}; keep data.lanes {len(lanes)}")
        rows = sum(state["rows"] for state in lanes.values())
        if rows % self._rows:
            raise ValueError(
                f"the checkpoint was made after {rows} rows, which train.rows_per_step ({self._rows}) does not divide; "
                "keep train.rows_per_step as it was"
            )
        self._ahead.close()
        for number, lane in self._lanes.items():
            lane.load_state(lanes[str(number)])
        self._first_row = rows + self._rank
        self._handed_out = self._lane_states()
        self._ahead = Prefetch(self._make, self._config.data.prefetch)

    def close(self) -> None:
        """Stop reading ahead. Safe to call twice."""
        self._ahead.close()

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _make(self) -> tuple[list[Batch], dict[str, Any]]:
        """One step's rows of this rank, and the state after them."""
        rows = range(self._first_row, self._first_row + self._rows, self._size)
        batches = [self._lanes[row % self._config.data.lanes].row() for row in rows]
        self._first_row += self._rows
        return batches, self._lane_states()

    def _lane_states(self) -> dict[str, Any]:
        return {str(number): lane.state() for number, lane in self._lanes.items()}

    def _draw(self, source: Source, position: int) -> Document | None:
        self._read += 1
        try:
            return source.document(position)
        except BadSample as error:
            self._bad += 1
            self._skip(source.label, error)
        allowed = min(self._config.data.max_bad_share * self._read, self._read - 1)  # without a good one, no row ends
        if self._read > FIRST_SAMPLES and self._bad > allowed:
            raise ValueError(
                f"{self._bad} of {self._read} samples are bad, more than data.max_bad_share "
                f"({self._config.data.max_bad_share:g}):\n{self.skipped_table()}"
            )
        return None

    def _skip(self, label: str, error: BadSample) -> None:
        self.skipped[label, error.reason] += 1
        if self.skipped[label, error.reason] == 1:
            logger.warning(
                "skipped a sample of %s (%s); more of this kind are only counted: %s", label, error.reason, error
            )

    def skipped_table(self) -> str:
        """`skipped` as lines of source, reason and count, the most frequent first."""
        return "\n".join(f"  {label}  {reason}  {count}" for (label, reason), count in self.skipped.most_common())

    def _report_shards(self) -> None:
        for source in self.sources:
            for reason, count in source.shards.rejected.items():
                self.skipped[source.label, reason] += count
            for path, damage in source.shards.damage.items():
                logger.warning("%s: the shard %r is damaged (%s); reading what is whole", source.label, path, damage)
