"""Training figures of several runs."""

import json
from pathlib import Path

from megatron_gemini.evaluation.runs import first_losses, training_figures


def write_run(path: Path, seconds: float, memory: int, losses: list[float], first: int = 1) -> Path:
    path.mkdir()
    summary = {"train_seconds": seconds, "peak_memory_bytes": memory, "tokens_per_second": 10 * seconds}
    (path / "summary.json").write_text(json.dumps(summary))
    lines = [json.dumps({"step": first + i, "loss": loss}) for i, loss in enumerate(losses)]
    (path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 9')
    return path


def test_seconds_add_up_memory_is_the_largest_and_the_rest_is_the_models_own(tmp_path) -> None:
    own = write_run(tmp_path / "own", 20.0, 5, [3.0, 2.5])
    other = write_run(tmp_path / "other", 10.0, 7, [1.0])
    figures = training_figures([own, other, tmp_path / "missing"])
    assert figures["train_seconds"] == 30.0
    assert figures["peak_memory_bytes"] == 7
    assert figures["tokens_per_second"] == 200.0
    assert figures["first_losses"] == [3.0, 2.5]
    assert list(figures["trained"]) == [str(own), str(other)]


def test_only_the_first_twenty_losses_of_a_run_from_its_first_step_are_kept(tmp_path) -> None:
    assert first_losses(write_run(tmp_path / "a", 1.0, 1, list(map(float, range(30)))) / "metrics.jsonl") == [
        float(i) for i in range(20)
    ]
    assert first_losses(write_run(tmp_path / "b", 1.0, 1, [1.0], first=5) / "metrics.jsonl") == []
    assert first_losses(tmp_path / "none.jsonl") == []


def test_no_runs_give_no_figures(tmp_path) -> None:
    assert training_figures([tmp_path]) == {"trained": {}}
