"""What a run measures: one record a step, in metrics.jsonl and in the trackers that the configuration asks for.

A record is a flat mapping of names to numbers. Its `step` counts the updates that are done, from 1, as everywhere a
person sees it: on the console, in names of checkpoints and in `train.steps`. The names that the progress bar and the
figures know:

- loss, loss_KIND: nats a target token, weighted as trained; by kind of target.
- validation_loss, validation_loss_KIND: the same on validation data, only in the records of some steps.
- learning_rate, gradient_norm.
- tokens, tokens_per_second: of the global step, without padding.
- share_KIND: of those tokens (`objectives.figures.token_kinds`).
- documents/LABEL, tokens/LABEL: of the global step, by data source.
- peak_memory_bytes, mfu: `throughput` and `models.flops`.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from megatron_gemini.checkpoint.index import telling
from megatron_gemini.config.run import RunConfig
from megatron_gemini.training.trackers import Tracker, open_trackers, warn_of

FILE_NAME = "metrics.jsonl"


class MetricsWriter:
    """Writes the records of a run; on any rank but 0 it does nothing.

    The file holds each step once, in order: a run that resumes after `start_step` steps first drops the records of
    later ones, which the interrupted run wrote after its last checkpoint. A run that starts at 0 begins a new file.

    Raises a `ValueError` where a tracker is asked for that is not installed, and where the file cannot be written.
    """

    def __init__(self, config: RunConfig, run_dir: str | Path, rank: int, start_step: int = 0) -> None:
        self.every, self.validation_every = config.logging.every, config.train.validation_every
        self.last_step = config.train.steps
        self.active = rank == 0
        self.trackers: list[Tracker] = []
        if not self.active:
            return
        directory = Path(run_dir)
        self.path = directory / FILE_NAME
        with telling(self.path):
            directory.mkdir(parents=True, exist_ok=True)
            _keep_until(self.path, start_step)
        self.trackers = open_trackers(config, directory, start_step)
        with telling(self.path):
            self.file = self.path.open("a", encoding="utf-8")

    def due(self, step: int) -> bool:
        """Whether a record of this step is wanted: the first, the last, every n-th, and those with validation
        losses."""
        validation = self.validation_every > 0 and step % self.validation_every == 0
        return validation or step % self.every == 0 or step in (1, self.last_step)

    def write(self, step: int, record: Mapping[str, float]) -> None:
        """Write the record of a step if it is due, at once, so that it can be followed and survives a crash."""
        if not self.active or not self.due(step):
            return
        values = {"step": step, **{name: _finite(value) for name, value in record.items()}}
        # Python would write NaN, which is not JSON: other readers refuse the whole line.
        with telling(self.path):
            self.file.write(json.dumps(values, allow_nan=False) + "\n")
            self.file.flush()
        self._tell(lambda tracker: tracker.write(step, record))

    def close(self) -> None:
        """Close the file and the trackers. Closing twice is allowed."""
        if self.active:
            with contextlib.suppress(OSError):  # of a full disk, which `write` has told
                self.file.close()
        self._tell(lambda tracker: tracker.close())
        self.trackers = []

    def _tell(self, call: Callable[[Tracker], None]) -> None:
        """Call every tracker. One that fails is told of and left out from then on: it is no reason to end a run."""
        for tracker in list(self.trackers):
            try:
                call(tracker)
            except Exception as error:
                self.trackers.remove(tracker)
                warn_of(tracker.name, error)


def read_metrics(path: str | Path) -> Iterator[dict[str, float]]:
    """The records of a metrics.jsonl, in order, each with its `step`. A line cut off by a crash is left out.

    A loss that was not finite is None in the file and `nan` here.
    """
    # A machine that fails may leave any bytes at the end of the file.
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            record = _record(line)
            if record is not None:
                yield {name: math.nan if value is None else value for name, value in record.items()}


def _record(line: str) -> dict | None:
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def _keep_until(path: Path, step: int) -> None:
    """Leave only the records of steps up to `step` in the file: all of them or the file as it was, also in a crash."""
    if not path.exists():
        return
    beside = path.with_suffix(".jsonl.new")
    beside.unlink(missing_ok=True)  # a link there would lead the records to another file
    with path.open(encoding="utf-8", errors="replace") as old, beside.open("w", encoding="utf-8") as new:
        for line in old:
            record = _record(line)
            if record is not None and record["step"] <= step:
                new.write(line.rstrip("\n") + "\n")
        # On the disk before it takes the old file's name: a machine that fails then leaves one of the two whole.
        new.flush()
        os.fsync(new.fileno())
    os.replace(beside, path)


def _finite(value: float) -> float | None:
    """JSON has no nan or infinity."""
    number = float(value)
    if not math.isfinite(number):
        return None
    return int(value) if isinstance(value, int) else number
