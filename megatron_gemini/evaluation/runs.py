"""What training took, read back from the run directories that a model came out of."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FIRST = 20  # losses that are kept, to compare layouts by


def training_figures(runs: Sequence[Path]) -> dict[str, Any]:
    """Figures of all the runs together, the model's own run first; a run without a summary.json is left out.

    train_seconds: sum over the runs. peak_memory_bytes: the largest. tokens_per_second and first_losses: of the
    model's own run. trained: the summary of every run by its directory.
    """
    summaries = {str(run): summary for run in runs if (summary := _read(run / "summary.json"))}
    figures: dict[str, Any] = {"trained": summaries}
    for name, combine in (("train_seconds", sum), ("peak_memory_bytes", max)):
        values = [summary[name] for summary in summaries.values() if name in summary]
        if values:
            figures[name] = combine(values)
    own = summaries.get(str(runs[0]), {})
    if "tokens_per_second" in own:
        figures["tokens_per_second"] = own["tokens_per_second"]
    if losses := first_losses(runs[0] / "metrics.jsonl"):
        figures["first_losses"] = losses
    return figures


def first_losses(path: Path) -> list[float]:
    """Losses of the first steps of a metrics.jsonl, in order; empty when it does not begin at the first step."""
    losses: list[float] = []
    if not path.is_file():
        return losses
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            record = _parsed(line)
            if record.get("step") != len(losses) or not isinstance(record.get("loss"), (int, float)):
                break
            losses.append(float(record["loss"]))
            if len(losses) == FIRST:
                break
    return losses


def _read(path: Path) -> dict[str, Any]:
    return _parsed(path.read_text(encoding="utf-8", errors="replace")) if path.is_file() else {}


def _parsed(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
