"""The metrics file through crashes and resumes, the trackers, and what is counted in a batch."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import types

import pytest

from megatron_gemini.config.run import RunConfig
from megatron_gemini.config.training import LoggingConfig, TrainConfig
from megatron_gemini.training import metrics
from megatron_gemini.training.metrics import (
    MetricsWriter,
    read_metrics,
)

QUIET = RunConfig(logging=LoggingConfig(tensorboard=False), train=TrainConfig(steps=10))


def write_steps(run_dir, steps, start_step=0, config=QUIET):
    writer = MetricsWriter(config, run_dir, rank=0, start_step=start_step)
    for step in steps:
        writer.write(step, {"loss": step + start_step / 100})
    writer.close()
    return [(record["step"], record["loss"]) for record in read_metrics(run_dir / "metrics.jsonl")]


def test_a_record_is_one_line_of_json_that_can_be_read_at_once(tmp_path):
    writer = MetricsWriter(QUIET, tmp_path / "new" / "run", rank=0)
    writer.write(1, {"loss": 2.5, "tokens": 7, "mfu": 0.5})
    assert (tmp_path / "new/run/metrics.jsonl").read_text() == '{"step": 1, "loss": 2.5, "tokens": 7, "mfu": 0.5}\n'
    writer.close()


def test_a_resumed_run_replaces_what_came_after_its_checkpoint(tmp_path):
    write_steps(tmp_path, range(1, 6))
    assert write_steps(tmp_path, range(4, 7), start_step=3) == [(1, 1), (2, 2), (3, 3), (4, 4.03), (5, 5.03), (6, 6.03)]


def test_a_run_from_the_start_begins_a_new_file(tmp_path):
    write_steps(tmp_path, range(1, 6))
    assert write_steps(tmp_path, range(1, 3)) == [(1, 1), (2, 2)]


def test_a_line_that_a_crash_cut_off_is_gone_after_the_resume(tmp_path):
    write_steps(tmp_path, range(1, 4))
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text()[:-5])
    assert [record["step"] for record in read_metrics(path)] == [1, 2]
    assert [step for step, _ in write_steps(tmp_path, range(3, 5), start_step=2)] == [1, 2, 3, 4]
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_a_crash_while_old_records_are_dropped_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    write_steps(tmp_path, range(1, 6))
    path = tmp_path / "metrics.jsonl"
    before = path.read_text()

    def crash(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", crash)
    with pytest.raises(KeyboardInterrupt):
        write_steps(tmp_path, range(3, 5), start_step=2)
    assert path.read_text() == before


def test_a_full_disk_is_one_line_that_names_the_file(tmp_path):
    writer = MetricsWriter(QUIET, tmp_path, rank=0)
    writer.file.close()
    writer.file = open("/dev/full", "a")  # noqa: SIM115
    with pytest.raises(ValueError, match=r"^cannot write .*metrics\.jsonl: No space left on device$"):
        writer.write(1, {"loss": 1.0})
    writer.close()


def test_records_are_not_written_through_a_link(tmp_path):
    write_steps(tmp_path, [1])
    (tmp_path / "other").write_text("kept")
    (tmp_path / "metrics.jsonl.new").symlink_to(tmp_path / "other")
    write_steps(tmp_path, [2], start_step=1)
    assert (tmp_path / "other").read_text() == "kept"


def test_a_loss_that_is_not_finite_is_valid_json_and_reads_as_nan(tmp_path):
    writer = MetricsWriter(QUIET, tmp_path, rank=0)
    writer.write(1, {"loss": math.inf})
    writer.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "loss": None}
    assert math.isnan(next(read_metrics(tmp_path / "metrics.jsonl"))["loss"])


def test_other_ranks_write_nothing(tmp_path):
    writer = MetricsWriter(RunConfig(), tmp_path / "run", rank=1)
    writer.write(1, {"loss": 1.0})
    writer.close()
    assert not (tmp_path / "run").exists()


def test_records_are_due_at_the_first_the_last_and_every_nth_step(tmp_path):
    config = RunConfig(logging=LoggingConfig(every=4, tensorboard=False), train=TrainConfig(steps=11))
    writer = MetricsWriter(config, tmp_path, rank=0)
    assert [step for step in range(1, 12) if writer.due(step)] == [1, 4, 8, 11]


def test_a_record_with_a_validation_loss_is_always_due(tmp_path):
    train = TrainConfig(steps=12, validation_every=5)
    config = RunConfig(logging=LoggingConfig(every=4, tensorboard=False), train=train)
    writer = MetricsWriter(config, tmp_path, rank=0)
    assert [step for step in range(1, 13) if writer.due(step)] == [1, 4, 5, 8, 10, 12]


def test_tensorboard_holds_the_same_numbers(tmp_path):
    config = RunConfig(logging=LoggingConfig(tensorboard=True))
    writer = MetricsWriter(config, tmp_path, rank=0)
    for step in range(2):
        writer.write(step, {"loss": 1.5 - step, "validation_loss_text": 0.25, "learning_rate": 0.5})
    writer.close()
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(0, 1.5), (1, 0.5)]
    assert {*events.Tags()["scalars"]} == {"loss", "validation_loss/text", "learning_rate"}


def test_a_missing_tensorboard_is_an_error_with_the_way_out(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match=r"pip install tensorboard, or set logging\.tensorboard to false"):
        MetricsWriter(RunConfig(), tmp_path, rank=0)


def test_a_missing_wandb_is_an_error_with_the_way_out(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    config = dataclasses.replace(QUIET, logging=LoggingConfig(tensorboard=False, wandb_project="p"))
    with pytest.raises(ValueError, match=r"logging\.wandb_project is 'p'.* pip install wandb"):
        MetricsWriter(config, tmp_path, rank=0)


def test_wandb_goes_on_with_its_run_after_a_resume_and_never_sees_the_environment(tmp_path, monkeypatch):
    calls: list[dict] = []
    logged: list = []

    def init(**arguments):
        calls.append(arguments)
        run = types.SimpleNamespace(id=arguments["id"] or f"run{len(calls)}", finish=lambda: logged.append("end"))
        run.log = lambda values, step: logged.append((step, values))
        return run

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    monkeypatch.setenv("WANDB_API_KEY", "s3cr3t")
    config = dataclasses.replace(QUIET, logging=LoggingConfig(tensorboard=False, wandb_project="p"))
    write_steps(tmp_path, [1], config=config)
    write_steps(tmp_path, [2], start_step=1, config=config)
    write_steps(tmp_path, [1], config=config)
    assert [call["id"] for call in calls] == [None, "run1", None]
    assert logged[:2] == [(1, {"loss": 1.0}), "end"]
    assert calls[0]["project"] == "p"
    assert calls[0]["config"] == dataclasses.asdict(config)
    assert "s3cr3t" not in str(calls)


class Failing:
    """A tracker that fails in one of its calls."""

    name = "the tracker"

    def __init__(self, call: str) -> None:
        self.call, self.calls = call, []

    def write(self, step: int, record: object) -> None:
        self.calls.append(step)
        if self.call == "write":
            raise ConnectionError("no route\nto host")

    def close(self) -> None:
        self.calls.append("close")
        if self.call == "close":
            raise RuntimeError("still uploading")


@pytest.mark.parametrize(
    ("call", "calls", "told"),
    [
        ("write", [0], "ConnectionError: no route to host"),
        ("close", [0, 1, "close"], "RuntimeError: still uploading"),
    ],
)
def test_a_tracker_that_fails_is_a_warning_and_the_others_go_on(tmp_path, monkeypatch, caplog, call, calls, told):
    failing, sound = Failing(call), Failing("")
    monkeypatch.setattr(metrics, "open_trackers", lambda *_: [failing, sound])
    assert write_steps(tmp_path, range(2)) == [(0, 0), (1, 1)]
    assert failing.calls == calls and sound.calls == [0, 1, "close"]
    assert caplog.messages == [f"the tracker failed and is left out from here on; the run goes on: {told}"]


def test_a_tracker_that_cannot_begin_is_a_warning(tmp_path, monkeypatch, caplog):
    def init(**_):
        raise ValueError("no key: run wandb login")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    config = dataclasses.replace(QUIET, logging=LoggingConfig(tensorboard=False, wandb_project="p"))
    assert write_steps(tmp_path, range(2), config=config) == [(0, 0), (1, 1)]
    (message,) = caplog.messages
    assert message.startswith("Weights & Biases failed") and message.endswith("ValueError: no key: run wandb login")
