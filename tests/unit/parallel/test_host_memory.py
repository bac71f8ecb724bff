"""What is offloaded comes back with its values, one ahead of its use, and streams wait where memory changes hands."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch

from megatron_gemini.parallel import host_memory
from megatron_gemini.parallel.host_memory import OnHost


def chain(count: int) -> tuple[list[torch.Tensor], list[OnHost]]:
    tensors = [torch.randn(3, 2, generator=torch.Generator().manual_seed(seed)) for seed in range(count)]
    kept: list[OnHost] = []
    for tensor in tensors:
        kept.append(OnHost(tensor, kept[-1] if kept else None))
    return tensors, kept


def on_device(kept: list[OnHost]) -> list[bool]:
    return [item._x is not None for item in kept]


def test_only_the_newest_stays_and_the_others_come_back_one_ahead() -> None:
    tensors, kept = chain(4)
    assert on_device(kept) == [False, False, False, True]
    for number in (3, 2, 1, 0):
        assert torch.equal(kept[number].take(), tensors[number])
        assert on_device(kept) == [place == number - 1 for place in range(4)]


def test_it_is_a_copy_and_does_not_see_later_writes() -> None:
    tensors, kept = chain(2)
    original = tensors[0].clone()
    tensors[0].zero_()
    kept[1].take()
    assert torch.equal(kept[0].take(), original)


def test_it_is_given_once_and_then_forgotten() -> None:
    _, kept = chain(2)
    kept[1].take()
    assert kept[1]._host is None and kept[1]._before is None
    with pytest.raises(AssertionError, match="taken twice"):
        kept[1].take()


class Stream:
    """Stands for a CUDA stream; every stream writes what it is told into one log."""

    def __init__(self, name: str, log: list[tuple]) -> None:
        self.name, self.log, self.events = name, log, 0

    def wait_stream(self, other: Stream) -> None:
        self.log.append((self.name, "waits for", other.name))

    def record_event(self) -> int:
        self.events += 1
        self.log.append((self.name, "has copied", self.events))
        return self.events

    def wait_event(self, event: int) -> None:
        self.log.append((self.name, "waits for copy", event))


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    log: list[tuple] = []
    compute, copies = Stream("compute", log), Stream("copies", log)
    monkeypatch.setattr(host_memory, "_copy_stream", lambda device: copies)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: compute)

    @contextlib.contextmanager
    def within(stream: Stream) -> Any:
        log.append((stream.name, "copies"))
        yield

    monkeypatch.setattr(torch.cuda, "stream", within)
    return log


def copied(number: int) -> list[tuple]:
    return [("copies", "waits for", "compute"), ("copies", "copies"), ("copies", "has copied", number)]


def test_device_memory_is_given_back_only_after_the_copy_out(log: list[tuple]) -> None:
    _, kept = chain(2)
    assert log == [*copied(1), *copied(2), ("compute", "waits for copy", 1)]
    assert on_device(kept) == [False, True]


def test_computation_waits_for_its_own_copy_and_not_for_the_one_ahead(log: list[tuple]) -> None:
    _, kept = chain(3)
    log.clear()
    kept[2].take()  # was never away; its memory may be handed on once the copy out has ended
    assert log == [*copied(4), ("compute", "waits for copy", 3)]
    log.clear()
    kept[1].take()
    assert log == [*copied(5), ("compute", "waits for copy", 4)]
