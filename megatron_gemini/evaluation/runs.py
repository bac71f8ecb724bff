"""What training took, read back from the run directories that a model came out of."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_gemini.evaluation.json_data import Json, parse_object

FIRST = 20  # losses that are kept, to compare layouts by


def training_figures(runs: Sequence[Path]) -> dict[str, Json]:
    """Figures of all the runs together, the model's own run first; a run without a summary.json is left out.

    train_seconds: sum over the runs. peak_memory_bytes: the largest. tokens_per_second and first_losses: of the
    model's own run. trained: the summary of every run by its directory.
    """
    summaries: dict[str, dict[str, Json]] = {}
    for run in runs:
        path = run / "summary.json"
        # A training that was stopped has none, and its model is evaluated all the same.
        if path.is_file() and (summary := parse_object(path.read_bytes())):
            summaries[str(run)] = summary
    figures: dict[str, Json] = {"trained": summaries}
    for name in ("train_seconds", "peak_memory_bytes"):
        values = [x for summary in summaries.values() if isinstance(x := summary.get(name), (int, float))]
        if values:
            # One run came after the other, so their times add up and their memories do not.
            figures[name] = sum(values) if name == "train_seconds" else max(values)
    # A rate of two models, or losses of two, would say nothing together.
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
    with path.open("rb") as file:
        for line in file:
            # The last line of a run that was killed may be half a record.
            record = parse_object(line)
            loss = record.get("loss")
            if record.get("step") != len(losses) + 1 or not isinstance(loss, (int, float)):
                break
            losses.append(float(loss))
            if len(losses) == FIRST:
                break
    return losses
