"""The loop around steps that change no weight, on an objective whose steps are written down."""

from __future__ import annotations

import json
import math
import signal
from pathlib import Path

import pytest

from megatron_gemini.checkpoint.directory import complete_steps, newest
from megatron_gemini.exit_status import NotLearningError
from megatron_gemini.training import loop
from megatron_gemini.training.loop import Loop
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
