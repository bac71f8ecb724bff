"""The loop around steps that change no weight, on an objective whose steps are written down."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_gemini.checkpoint import save as saving
from megatron_gemini.checkpoint.directory import complete_steps, newest
from megatron_gemini.checkpoint.save import SaveError
from megatron_gemini.exit_status import NotLearningError
from megatron_gemini.training import loop
from megatron_gemini.training.loop import Loop
from megatron_gemini.training.stop import SIGNALS, StoppedError
from tests.unit.training.plain_objective import Planned, objective

GOOD, BAD, NOTHING = Planned(), Planned(norm=math.nan), Planned(weight=0.0)


def saved(run: Path) -> list[int]:
    return [int(path.name.removeprefix("step-")) for _, path in complete_steps(run)]


def test_a_loss_that_stays_nan_ends_the_run_and_keeps_the_good_checkpoints(tmp_path: Path) -> None:
    steps = [GOOD] * 4 + [BAD] * 8
    with pytest.raises(NotLearningError) as raised:
        Loop(objective(tmp_path, steps, save_every=1, keep=2)).run()
    assert saved(tmp_path) == [3, 4]
    newest_one = tmp_path / "checkpoints" / "step-00000004"
    assert str(raised.value) == (
        "steps 5 to 9 changed no weight (the gradient norm was not finite; train.max_skipped_steps is 5); "
        f"lower optimizer.lr or look at the data of these steps; the newest checkpoint is {newest_one}"
    )
    assert not (tmp_path / "summary.json").exists()


def test_the_bound_is_a_setting(tmp_path: Path) -> None:
    assert Loop(objective(tmp_path, [GOOD, *[BAD] * 6, GOOD], max_skipped_steps=7)).run() == 0
    with pytest.raises(NotLearningError, match="steps 2 to 3 changed"):
        Loop(objective(tmp_path / "b", [GOOD, *[BAD] * 6, GOOD], max_skipped_steps=2)).run()


def test_a_run_without_one_trained_step_is_no_success_however_short(tmp_path: Path) -> None:
    with pytest.raises(NotLearningError, match=r"steps 1 to 3 changed no weight .* there is no checkpoint yet"):
        Loop(objective(tmp_path, [BAD] * 3)).run()
    assert saved(tmp_path) == []


def test_a_save_that_is_due_while_steps_are_skipped_waits_for_one_that_trains(tmp_path: Path) -> None:
    Loop(objective(tmp_path, [GOOD, BAD, BAD, GOOD, GOOD], save_every=2, keep=9)).run()
    assert saved(tmp_path) == [4, 5]


def test_a_save_that_fails_is_counted_and_told_and_the_run_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    true, calls = saving.seal, []

    def seal(*given: object, **named: object) -> None:
        calls.append(given)
        if len(calls) in (2, 3):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        true(*given, **named)

    monkeypatch.setattr(saving, "seal", seal)
    assert Loop(objective(tmp_path, [GOOD] * 5, save_every=1, keep=9)).run() == 0
    assert saved(tmp_path) == [1, 4, 5]
    assert json.loads((tmp_path / "summary.json").read_text())["failed_saves"] == 2
    told = [line for line in capsys.readouterr().out.splitlines() if "No space left" in line]
    assert len(told) == 2 and told[1].endswith("the run goes on (2 of its saves have failed)")


def test_some_checkpoints_are_kept_for_ever(tmp_path: Path) -> None:
    Loop(objective(tmp_path, [GOOD] * 7, save_every=1, keep=1, keep_every=3)).run()
    assert saved(tmp_path) == [3, 6, 7]


def test_a_file_stops_a_run_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    touch = Planned(before=lambda: (tmp_path / "stop").touch())
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        number = Loop(objective(tmp_path, [GOOD, GOOD, touch, GOOD])).run()
    finally:
        for each, handler in handlers.items():
            signal.signal(each, handler)
    assert StoppedError(number).code == 128 + signal.SIGTERM
    assert saved(tmp_path) == [2] and not (tmp_path / "stop").exists()
    assert "stopped by the file stop in its folder after step 2; saved " in capsys.readouterr().out
    again = objective(tmp_path, [GOOD] * 4)
    assert Loop(again).run() == 0 and again.engine.updates == 2


def test_a_disk_without_room_is_told_before_the_first_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=-1))
    assert Loop(objective(tmp_path, [GOOD])).run() == 0
    assert "train.keep 2 needs room for 3 more" in capsys.readouterr().out


def test_the_last_save_may_not_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def seal(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(saving, "seal", seal)
    with pytest.raises(SaveError, match="Read-only file system"):
        Loop(objective(tmp_path, [GOOD] * 2)).run()


def test_the_end_of_a_run_writes_no_second_copy_of_the_same_weights(tmp_path: Path) -> None:
    Loop(objective(tmp_path, [GOOD, GOOD, BAD], save_every=2)).run()
    assert saved(tmp_path) == [2]
    assert json.loads((tmp_path / "summary.json").read_text())["steps"] == 3


def test_a_stop_after_skipped_steps_names_the_checkpoint_that_there_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stop = Planned(before=lambda: signal.raise_signal(signal.SIGUSR1))
    before = signal.getsignal(signal.SIGUSR1)
    try:
        assert Loop(objective(tmp_path, [GOOD, GOOD, BAD, stop, GOOD], save_every=2)).run() == signal.SIGUSR1
    finally:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        signal.signal(signal.SIGUSR1, before)
    kept = tmp_path / "checkpoints" / "step-00000002"
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == (
        f"stopped by SIGUSR1 after step 3; nothing was learned since {kept}; the same command goes on from there"
    )
    again = objective(tmp_path, [GOOD, GOOD, BAD, GOOD, GOOD], save_every=2)
    assert Loop(again).run() == 0
    assert again.engine.updates == 2
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [
        *range(1, 6)
    ]


def test_a_step_without_a_weighted_token_is_told_and_passed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = objective(tmp_path, [GOOD, NOTHING, GOOD])
    assert Loop(plain).run() == 0
    assert plain.engine.updates == 2
    assert "step 2 changed no weight: no token had a loss weight\n" in capsys.readouterr().out
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [record["skipped"] for record in records] == [0, 1, 0]


def test_data_that_never_have_a_weighted_token_end_the_run_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(NotLearningError, match=r"no token had a loss weight.*check the loss weights of the objective"):
        Loop(objective(tmp_path, [GOOD, *[NOTHING] * 5, GOOD])).run()


def test_both_reasons_are_told(tmp_path: Path) -> None:
    with pytest.raises(NotLearningError, match="not finite, no token had a loss weight; train"):
        Loop(objective(tmp_path, [GOOD, BAD, NOTHING, BAD, BAD, BAD])).run()


def test_a_run_that_goes_on_counts_anew(tmp_path: Path) -> None:
    Loop(objective(tmp_path, [GOOD] * 2)).run()
    with pytest.raises(NotLearningError, match="steps 3 to 4 changed no weight"):
        Loop(objective(tmp_path, [GOOD, GOOD, BAD, BAD])).run()
    assert newest(tmp_path).path == tmp_path / "checkpoints" / "step-00000002"


def test_the_watch_over_ranks_ends_with_the_run_however_it_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[int] = []

    class Watch:
        def close(self) -> None:
            closed.append(1)

    monkeypatch.setattr(loop, "watch_ranks", lambda *_: Watch())
    Loop(objective(tmp_path / "a", [GOOD])).run()
    assert closed == [1]
    with pytest.raises(NotLearningError):
        Loop(objective(tmp_path / "b", [BAD])).run()
    assert closed == [1, 1]


def test_a_figure_that_cannot_be_drawn_is_a_warning_at_the_end_of_a_good_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("no font")

    monkeypatch.setattr(loop, "plot_losses", fails)
    assert Loop(objective(tmp_path, [GOOD])).run() == 0
    assert saved(tmp_path) == [1] and (tmp_path / "summary.json").exists()
    assert [m for m in caplog.messages if "no font" in m and m.startswith("the figure of the losses failed")]
