"""What is shown while training: plain lines at a sensible rate, one bar on a terminal, a summary at the end."""

from __future__ import annotations

import io
import os

import pytest

from megatron_gemini.training.progress import Progress, describe

RECORD = {
    "loss": 2.34567,
    "learning_rate": 1e-3,
    "tokens": 2000,
    "tokens_per_second": 12345.0,
    "share_text": 0.6,
    "share_image": 0.4,
    "share_audio": 0.0,
    "peak_memory_bytes": 3 << 29,
    "mfu": 0.417,
}


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock() -> Clock:
    return Clock()


def train(clock, stream, steps, seconds, start=0, until=None, rank=0, **extra):
    progress = Progress(steps, start, rank, stream, clock)
    for step in range(start, steps if until is None else until):
        clock.now += seconds
        progress.update(step + 1, RECORD | extra.get(f"at_{step}", {}))
    progress.finish()
    return stream.getvalue().splitlines()


def test_lines_come_at_the_first_and_last_step_and_at_most_every_five_seconds(clock):
    lines = train(clock, io.StringIO(), steps=100, seconds=0.125)
    shown = [line.split()[1] for line in lines[:-1]]
    assert shown == ["1/100", "41/100", "81/100", "100/100"]


def test_a_slow_run_shows_every_step(clock):
    assert len(train(clock, io.StringIO(), steps=4, seconds=60)) == 5


def test_a_validation_loss_is_always_shown(clock):
    lines = train(clock, io.StringIO(), steps=100, seconds=0.01, at_40={"validation_loss": 1.5})
    assert [line.split()[1] for line in lines[:-1] if "validation 1.5000" in line] == ["41/100"]


def test_a_line_says_what_was_measured_and_the_time_left(clock):
    lines = train(clock, io.StringIO(), steps=1000, seconds=10, until=41)
    assert lines[40] == (
        "step 41/1000  loss 2.3457  lr 1.00e-03  12.3k tokens/s  1.50 GiB  MFU 41.7%  text 60% image 40%  2:39:50 left"
    )


def test_the_slow_first_step_does_not_spoil_the_time_left(clock):
    stream = io.StringIO()
    progress = Progress(11, 0, 0, stream, clock)
    clock.now += 600
    progress.update(1, RECORD)
    clock.now += 6
    progress.update(2, RECORD)
    assert stream.getvalue().splitlines()[-1].endswith("  0:54 left")


def test_the_summary_has_the_mean_speed_and_the_latest_validation_loss(clock):
    lines = train(clock, io.StringIO(), steps=50, seconds=2, at_10={"validation_loss": 1.5})
    expected = "trained 50 steps in 1:40  loss 2.3457  validation 1.5000  1.0k tokens/s  1.50 GiB  MFU 41.7%"
    assert lines[-1] == expected


def test_a_run_that_was_stopped_or_resumed_says_so(clock):
    lines = train(clock, io.StringIO(), steps=50, seconds=2, start=10, until=20)
    assert lines[-1].startswith("stopped at step 20/50 after 10 steps in 0:20")


def test_a_run_without_a_step_left_has_a_summary(clock):
    assert train(clock, io.StringIO(), steps=50, seconds=2, start=50) == ["trained 0 steps in 0:00"]


def test_other_ranks_are_silent(clock):
    assert train(clock, io.StringIO(), steps=5, seconds=10, rank=1) == []
    assert train(clock, Terminal(), steps=5, seconds=10, rank=1) == []


def test_a_terminal_has_one_bar_and_notes_above_it(clock):
    stream = Terminal()
    progress = Progress(20, 5, 0, stream, clock)
    progress.update(6, RECORD)
    progress.note("saved step 6")
    for step in range(6, 20):
        progress.update(step + 1, RECORD)
    progress.finish()
    shown = stream.getvalue()
    assert "saved step 6\n" in shown
    assert "20/20  loss 2.3457  12.3k tokens/s" in shown
    assert shown.count("\n") == 3  # the note, the finished bar, the summary
    assert shown.splitlines()[-1].startswith("trained 15 steps")


def test_what_was_not_measured_is_not_shown():
    assert describe({"loss": 1.0, "mfu": None}) == "loss 1.0000"  # type: ignore[dict-item]
    assert describe({}) == ""


def test_a_reader_that_has_gone_does_not_end_the_run() -> None:
    """As after Ctrl-C on `... | tee log`: the pipe's reader is gone before the run has saved."""
    reader, writer = os.pipe()
    with os.fdopen(writer, "w") as stream:
        progress = Progress(3, stream=stream)
        progress.note("heard")
        os.close(reader)
        for step in range(3):
            progress.update(step + 1, {"loss": 1.0, "tokens": 10})
        progress.finish()


def test_samples_that_were_left_out_are_shown() -> None:
    assert "3 samples skipped" in describe({"loss": 1.0, "skipped_samples": 3})
    assert "left out" not in describe({"loss": 1.0, "skipped_samples": 0})
