"""One run at a time in a folder; a dead one's lock is taken over."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_gemini.parallel.topology import Topology
from megatron_gemini.training import run_lock
from megatron_gemini.training.run_lock import DEAD, NAME, REFRESH, Holder, RunLock, locked
from megatron_gemini.training.stop import started


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield child
    child.kill()
    child.wait()


def held(run: Path, holder: Holder, age: float = 0.0) -> Path:
    """A lock that `holder` has written, and that is `age` seconds old."""
    path = run / NAME
    path.write_text(json.dumps(dataclasses.asdict(holder)))
    now = path.stat().st_mtime
    os.utime(path, (now - age, now - age))
    return path


def of(process: subprocess.Popen[bytes]) -> Holder:
    return dataclasses.replace(Holder.here(), pid=process.pid, started=started(process.pid))


def test_a_second_run_is_refused_at_once_and_told_by_whom(tmp_path: Path, process: subprocess.Popen[bytes]) -> None:
    before = held(tmp_path, of(process), age=10 * DEAD).read_text()  # it is alive, however long it has been silent
    with pytest.raises(ValueError, match=rf"is in use by process {process.pid} on {Holder.here().host}; wait"):
        RunLock(tmp_path).take()
    assert (tmp_path / NAME).read_text() == before
    assert [path.name for path in tmp_path.iterdir()] == [NAME]


def test_a_dead_ones_lock_is_taken_over(tmp_path: Path, process: subprocess.Popen[bytes]) -> None:
    held(tmp_path, of(process))
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # a zombie, which nobody has waited for yet
    lock = RunLock(tmp_path)
    lock.take()
    lock.check()
    lock.release()
    assert not list(tmp_path.iterdir())


def test_another_process_of_the_same_number_is_not_taken_for_the_holder(tmp_path: Path) -> None:
    held(tmp_path, dataclasses.replace(Holder.here(), started="1"))
    RunLock(tmp_path).take()


@pytest.mark.parametrize("holder", [dataclasses.replace(Holder.here(), machine="another", host="node7"), None])
def test_a_holder_that_cannot_be_seen_is_judged_by_its_last_sign(tmp_path: Path, holder: Holder | None) -> None:
    path = held(tmp_path, holder or Holder.here(), age=DEAD - 30)
    if holder is None:
        path.write_text('{"host": ')
        os.utime(path, (path.stat().st_mtime - DEAD + 30,) * 2)
    with pytest.raises(
        ValueError, match=r"in use by (process \d+ on node7|what has written .*), .*last sign \d+ s ago"
    ):
        RunLock(tmp_path).take()
    os.utime(path, (path.stat().st_mtime - 60,) * 2)
    RunLock(tmp_path).take()


def test_the_holder_gives_signs(tmp_path: Path) -> None:
    lock = RunLock(tmp_path)
    lock.take()
    lock._ended.set()
    os.utime(lock.path, (0, 0))
    waits = iter([False, True])
    lock._ended = SimpleNamespace(wait=lambda seconds: next(waits), set=lambda: None)  # type: ignore[assignment]
    lock._refresh()
    assert lock.path.stat().st_mtime > 0


def test_of_many_that_take_a_dead_lock_at_once_one_gets_it(tmp_path: Path) -> None:
    held(tmp_path, dataclasses.replace(Holder.here(), started="1"))
    taken = []

    def take() -> None:
        try:
            lock = RunLock(tmp_path)
            lock.take()
            taken.append(lock)
        except ValueError:
            pass

    threads = [threading.Thread(target=take) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) == 1
    taken[0].check()


def test_a_run_that_has_lost_its_lock_saves_nothing_and_leaves_it(tmp_path: Path) -> None:
    lock = RunLock(tmp_path)
    lock.take()
    held(tmp_path, dataclasses.replace(Holder.here(), host="node7", pid=5))
    with pytest.raises(ValueError, match="process 5 on node7 has taken it; it ends without saving"):
        lock.check()
    lock.release()
    assert (tmp_path / NAME).exists()
    (tmp_path / NAME).unlink()
    with pytest.raises(ValueError, match="is gone; it ends without saving"):
        lock.check()


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_a_folder_that_cannot_be_written_to_is_told(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number), "x")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(ValueError, match=rf"cannot write into .*: {os.strerror(number)}; give another"):
        RunLock(tmp_path).take()


def test_a_lock_that_is_a_link_is_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "other").write_text("kept")
    (tmp_path / NAME).symlink_to(tmp_path / "other")
    with pytest.raises(ValueError, match="cannot write into"):
        RunLock(tmp_path).take()
    assert (tmp_path / "other").read_text() == "kept"


def test_rank_0_has_the_lock_and_all_ranks_the_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    def together(problem: str, topology: Topology, device: torch.device) -> None:
        said.append(problem)
        if any(said):
            raise ValueError(next(filter(None, said)))

    monkeypatch.setattr(run_lock, "raise_together", together)
    ranks = [dataclasses.replace(Topology.serial(), rank=rank, world=2) for rank in (0, 1)]
    with locked(tmp_path, ranks[0], torch.device("cpu")) as lock, locked(tmp_path, ranks[1], torch.device("cpu")) as no:
        assert lock is not None and no is None
        for rank in ranks:
            with pytest.raises(ValueError, match="is in use by process"), locked(tmp_path, rank, torch.device("cpu")):
                pass
        lock.check()  # who was refused has not released it
    assert not list(tmp_path.iterdir())


def test_the_documents_say_when_a_lock_is_dead():
    text = (Path(__file__).parents[3] / "docs/design.md").read_text()
    assert f"{DEAD:.0f} seconds after its last sign, which a holder gives every {REFRESH:.0f} seconds" in text
