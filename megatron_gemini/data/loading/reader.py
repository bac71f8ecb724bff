"""Sources and the lanes that draw from them, as one process runs them: a rank itself, or one of its workers."""

from __future__ import annotations

import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import TypeAlias

from megatron_gemini.config.run import RunConfig
from megatron_gemini.contracts import Batch, RowFormat, TokenLayout
from megatron_gemini.data.loading.lane import Lane, LaneState
from megatron_gemini.data.loading.source import Cache, DocumentSource, source_labels
from megatron_gemini.data.packing.columns import check_columns
from megatron_gemini.data.samples.document import Document, Encodes
from megatron_gemini.modalities.bad_sample import FILTERED, BadSample, FilteredSample, guarded

logger = logging.getLogger(__name__)
FIRST_SAMPLES = 200  # before the share of bad ones is judged
FEW_PASS = 10_000  # samples of a lane, of which a filter should have let one pass

Watch: TypeAlias = Callable[[int, int, int], None]
"""Told (lane, number of the source, position) of what is about to be decoded."""


def make_sources(config: RunConfig, layout: TokenLayout, tokenizer: Encodes, cache_bytes: int) -> list[DocumentSource]:
    """The sources of data.sources. Raises ValueError for shards that are missing or empty."""
    data, cache = config.data, Cache(cache_bytes)
    return [
        DocumentSource(source, label, config, layout, tokenizer, cache, data.caption_dropout)
        for source, label in zip(data.sources, source_labels(data.sources), strict=True)
    ]


class LaneReader:
    """Some of the lanes. Raises ValueError where more than data.max_bad_share of their samples are bad."""

    def __init__(
        self,
        config: RunConfig,
        sources: list[DocumentSource],
        lanes: Iterable[int],
        form: RowFormat,
        watch: Watch = lambda lane, source, position: None,
        done: Callable[[], None] = lambda: None,
    ) -> None:
        """form: what the objective wants of rows. watch, done: called before and after a sample is read and decoded."""
        data = config.data
        self._config, self._form, self.sources, self._watch, self._done = config, form, sources, watch, done
        self._told: set[tuple[str, str]] = set()
        self.lanes = {
            number: Lane(
                number,
                data.lanes,
                sources,
                self._draw,
                seed=config.train.seed,
                rows_per_step=config.train.rows_per_step,
                data=data,
                form=form,
            )
            for number in lanes
        }

    def row(self, number: int) -> tuple[Batch, LaneState]:
        """Row `number` of the run, which comes from lane number mod data.lanes, and the state of the lane after it."""
        lane = self.lanes[number % self._config.data.lanes]
        return lane.row(), lane.state()

    def states(self) -> dict[str, LaneState]:
        """State of every lane by its number as a string."""
        return {str(number): lane.state() for number, lane in self.lanes.items()}

    def load_states(self, states: Mapping[str, LaneState]) -> None:
        for number, lane in self.lanes.items():
            lane.load_state(states[str(number)])

    def _draw(self, lane: Lane, number: int, position: int) -> Document:
        source = self.sources[number]
        self._watch(lane.number, number, position)
        try:
            document = source.document(position)
            with guarded("columns", document.key):  # when the row is packed, it would be too late to skip it
                check_columns(document, self._form.columns)
            return document
        except BadSample as error:
            if (source.label, error.reason) not in self._told:
                self._told.add((source.label, error.reason))
                logger.warning(
                    "skipped a sample of %s (%s); more of this kind are only counted: %s",
                    source.label,
                    error.reason,
                    error,
                    # The error behind one that nobody foresaw, for whoever has to mend it.
                    exc_info=error if error.__cause__ is not None and "--debug" in sys.argv else None,
                )
            if not isinstance(error, FilteredSample):
                self._judge(source.label, error.reason)
            elif lane.read > FEW_PASS and lane.skipped.total() + 1 >= lane.read:
                raise ValueError(
                    f"none of the first {lane.read} samples can be used:\n{skipped_table(self.skipped())}\n"
                    "look at the filters of data.sources"
                ) from None
            raise
        finally:
            self._done()

    def _judge(self, label: str, reason: str) -> None:
        """Called with a bad sample that is not counted in `skipped` yet."""
        skipped = self.skipped() + Counter({(label, reason): 1})
        # What a filter leaves out has been read and is not bad: it counts on neither side.
        bad_ones = Counter({key: count for key, count in skipped.items() if not key[1].startswith(FILTERED)})
        bad = bad_ones.total()
        read = sum(lane.read for lane in self.lanes.values()) - (skipped.total() - bad)
        allowed = min(self._config.data.max_bad_share * read, read - 1)  # without a good one, no row ends
        if read > FIRST_SAMPLES and bad > allowed:
            raise ValueError(
                f"{bad} of {read} samples are bad, more than data.max_bad_share "
                f"({self._config.data.max_bad_share:g}):\n{skipped_table(bad_ones)}"
            )

    def skipped(self) -> Counter[tuple[str, str]]:
        """Number of samples that the lanes left out, by (source, reason)."""
        total: Counter[tuple[str, str]] = Counter()
        for lane in self.lanes.values():
            total.update(lane.skipped)
        return total


def skipped_table(skipped: Counter[tuple[str, str]]) -> str:
    """Lines of source, reason and count, the most frequent first."""
    return "\n".join(f"  {label}  {reason}  {count}" for (label, reason), count in skipped.most_common())
