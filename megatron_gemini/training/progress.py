"""What a person sees while a run trains: one live bar on a terminal, plain lines now and then elsewhere."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, TextIO

SECONDS_BETWEEN_LINES = 5.0


class Progress:
    """Shows the steps of a run; on any rank but 0 it is silent.

    steps: of the whole run; start: the step that this process begins with, after a resume.
    stream: standard output by default. On a terminal there is one bar; otherwise a line for the first and the last
        step, for a validation loss, and at most one in `SECONDS_BETWEEN_LINES`.
    """

    def __init__(
        self,
        steps: int,
        start: int = 0,
        rank: int = 0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.steps, self.start, self.done = steps, start, start
        self.stream: Any = _Enduring(stream or sys.stdout)
        self.active = rank == 0
        self.clock = clock
        self.began = self.last_update = clock()
        self.last_line = -math.inf
        self.seconds_per_step: float | None = None
        self.tokens = 0.0
        self.latest: dict[str, float] = {}
        self.bar: Any = None
        if self.active and self.stream.isatty():
            from tqdm import tqdm

            layout = "{n}/{total}  {desc}  {remaining} left |{bar}|"  # the bar takes what the numbers leave
            self.bar = tqdm(total=steps, initial=start, file=self.stream, dynamic_ncols=True, bar_format=layout)

    def update(self, step: int, record: Mapping[str, float]) -> None:
        """`step` steps are done; `record` holds what `metrics` names, as far as it was measured."""
        self._time(step)
        self.tokens += record.get("tokens", 0)
        self.latest.update(record)
        if not self.active:
            return
        if self.bar is not None:
            brief = {name: value for name, value in self.latest.items() if name != "learning_rate"}  # fits 80 columns
            self.bar.set_description_str(describe(brief), refresh=False)
            self.bar.update(self.done - self.bar.n)
            return
        ends = self.done in (self.start + 1, self.steps)
        # A validation loss is in few records, and a run that writes to a file has no other place for people to see it.
        if ends or "validation_loss" in record or self.clock() - self.last_line >= SECONDS_BETWEEN_LINES:
            self.last_line = self.clock()
            left = (self.seconds_per_step or 0.0) * (self.steps - self.done)
            shown = f"  {_duration(left)} left" if self.done < self.steps else ""
            self.note(f"step {self.done}/{self.steps}  {describe(record)}{shown}")

    def note(self, text: str) -> None:
        """Print a line, above the bar where there is one."""
        if not self.active:
            return
        if self.bar is not None:
            self.bar.write(text, file=self.stream)
        else:
            print(text, file=self.stream, flush=True)

    def finish(self) -> None:
        """Close the bar and print one line on the whole: also right for a run that was stopped early."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None
        seconds = self.clock() - self.began
        how = "trained" if self.done >= self.steps else f"stopped at step {self.done}/{self.steps} after"
        parts = [f"{how} {self.done - self.start} steps in {_duration(seconds)}"]
        if self.tokens and seconds > 0:
            self.latest["tokens_per_second"] = self.tokens / seconds
        # A rate of the whole run, not of its last step; shares and the learning rate are of one step only.
        whole = {name: value for name, value in self.latest.items() if not name.startswith(("share_", "learning_rate"))}
        self.note("  ".join([*parts, describe(whole)]).rstrip())

    def _time(self, step: int) -> None:
        """Keep a running mean of a step's time, in which the first step of a process, slow to start, is forgotten."""
        now = self.clock()
        newly_done = step - self.done
        if newly_done > 0:
            seconds = (now - self.last_update) / newly_done
            # The first step has no mean to join, and the second one's time replaces the first one's.
            settled = self.seconds_per_step is not None and self.done > self.start + 1
            self.seconds_per_step = 0.9 * self.seconds_per_step + 0.1 * seconds if settled else seconds  # type: ignore[operator]
        self.done, self.last_update = max(self.done, step), now


class _Enduring:
    """A stream that falls silent once nobody reads it.

    Ctrl-C also ends the `tee` that a run is piped into, and a closed terminal takes no more text, but the run has yet
    to save.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            self._fall_silent()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._fall_silent()

    def _fall_silent(self) -> None:
        # The descriptor itself is led away: Python flushes the stream once more at its end, with what it still holds.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)


def describe(record: Mapping[str, float]) -> str:
    """A record in one short line: what it has of loss, rate, shares, memory and utilization."""
    parts = []
    for name, form in _FORMS.items():
        if record.get(name) is not None:
            parts.append(form(record[name]))
    if record.get("skipped_samples"):
        parts.append(f"{record['skipped_samples']:.0f} samples skipped")
    shares = [
        f"{name.removeprefix('share_')} {value:.0%}"
        for name, value in record.items()
        if name.startswith("share_") and value
    ]
    return "  ".join([*parts, " ".join(shares)]).rstrip()


_FORMS: dict[str, Callable[[float], str]] = {
    "loss": lambda value: f"loss {value:.4f}",
    "validation_loss": lambda value: f"validation {value:.4f}",
    "learning_rate": lambda value: f"lr {value:.2e}",
    "tokens_per_second": lambda value: f"{_short(value)} tokens/s",
    "peak_memory_bytes": lambda value: f"{value / 2**30:.2f} GiB",
    "mfu": lambda value: f"MFU {value:.1%}",
}


def _short(value: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.1f}{letter}"
    return f"{value:.0f}"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
