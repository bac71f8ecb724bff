"""Who counts as silent, and what a signal changes, on a clock and a store of this process."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
import torch.distributed as dist

from megatron_gemini.training import rank_watch
from megatron_gemini.training.rank_watch import RankWatch, Signs, watch_ranks


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_a_rank_whose_sign_stays_the_same_is_silent_and_named_with_its_step(clock: Clock) -> None:
    signs = Signs([1, 2], clock)
    signs.hear(1, "1 17 process 7 on node")
    for beat in range(6):
        clock.now += 5
        signs.hear(1, "1 17 process 7 on node")
        signs.hear(2, f"{beat} 18 process 8 on node")
        found = signs.silent(20, usual=5)
    assert found == ["rank 1 (process 7 on node) has given no sign of life for 30 s; its last step was 17"]


def test_a_rank_that_never_began_is_told_so(clock: Clock) -> None:
    signs = Signs([1], clock)
    clock.now += 6
    assert signs.silent(5, usual=5) == ["rank 1 has given no sign of life for 6 s; it has not begun to train"]


def test_a_rank_that_is_done_is_not_missed(clock: Clock) -> None:
    signs = Signs([1], clock)
    signs.hear(1, "1 17 process 7 on node")
    signs.hear(1, "done")
    clock.now += 6
    assert signs.silent(5, usual=5) == []


def test_a_process_that_was_stopped_itself_blames_nobody(clock: Clock) -> None:
    signs = Signs([1], clock)
    clock.now += 500
    assert signs.silent(5, usual=1) == []
    for _ in range(6):
        clock.now += 1
        found = signs.silent(5, usual=1)
    assert len(found) == 1


class Ended(BaseException):
    """In the place of the end of the process."""


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Iterator[RankWatch]:
    """Of rank 0 of two, with a store, whose threads have not begun."""
    monkeypatch.setattr(signal, "set_wakeup_fd", lambda *_, **__: -1)
    made = RankWatch(0, 2, 600.0, lambda: 18, dist.HashStore())
    yield made
    for end in (made.reads, made.writes):
        os.close(end)


def test_a_signal_shortens_the_patience(
    watch: RankWatch, clock: Clock, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def end(status: int) -> None:
        raise Ended(status)

    monkeypatch.setattr(rank_watch.os, "_exit", end)
    watch.signs = Signs([1], clock)
    watch.signs.hear(1, "3 17 process 7 on node")
    clock.now += 11
    watch.signs.looked = clock.now
    os.write(watch.writes, bytes([signal.SIGTERM]))
    with pytest.raises(Ended) as ended:
        watch._judge()
    assert ended.value.args == (4,)
    assert capsys.readouterr().err == (
        "megatron-gemini: error: asked to stop by SIGTERM, but rank 1 (process 7 on node) has given no sign of life "
        "for 11 s; its last step was 17, of this rank 18 (train.rank_timeout is 600); nothing was saved, and the same "
        "command goes on from the newest checkpoint\n"
    )


def test_python_s_own_way_to_hear_of_signals_is_as_before_once_it_is_closed() -> None:
    reads, writes = os.pipe()
    os.set_blocking(writes, False)
    before = signal.set_wakeup_fd(writes)
    try:
        watch = RankWatch(0, 2, 600.0, lambda: 18, dist.HashStore()).start()
        watch.close()
        assert signal.set_wakeup_fd(before) == writes
    finally:
        signal.set_wakeup_fd(before)
        os.close(reads)
        os.close(writes)


def test_one_rank_and_a_limit_of_zero_watch_nobody() -> None:
    assert watch_ranks(0, 1, 600.0, lambda: 0) is None
    assert watch_ranks(0, 2, 0.0, lambda: 0) is None
