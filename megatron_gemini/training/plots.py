"""The figure of a run: losses by modality, validation losses and the learning rate over the steps."""

from __future__ import annotations

from pathlib import Path

from megatron_gemini.contracts import TEXT
from megatron_gemini.training.metrics import read_metrics

_COLORS = {"": "#333333", TEXT: "#0072b2"}
_OTHER_COLORS = ("#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # told apart by the color-blind (Okabe, Ito)


def plot_losses(metrics_path: str | Path, out_png: str | Path) -> None:
    """Draw a metrics.jsonl into a PNG. Raises a `ValueError` where it holds no losses."""
    records = list(read_metrics(metrics_path))
    trained, validation = _curves(records, "loss"), _curves(records, "validation_loss")
    if not trained:
        raise ValueError(f"{metrics_path} holds no record of a loss; there is nothing to draw")

    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    figure = Figure(figsize=(8, 6), layout="constrained")
    losses, rate = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    # Sorted, so that a kind has one color in the figures of all runs with the same kinds.
    others = sorted({*trained, *validation} - set(_COLORS))
    colors = _COLORS | {name: _OTHER_COLORS[i % len(_OTHER_COLORS)] for i, name in enumerate(others)}
    for name, (steps, values) in trained.items():
        losses.plot(steps, values, color=colors[name], alpha=0.25, linewidth=0.8)
        losses.plot(steps, _smoothed(values), color=colors[name], linewidth=1.6, label=name or "all")
    for name, (steps, values) in validation.items():
        label = f"{name or 'all'}, held out"
        losses.plot(steps, values, color=colors[name], linestyle="--", marker="o", markersize=4, label=label)
    losses.set_ylabel("loss (nats per target)")
    losses.legend(frameon=False, ncols=2)
    steps, values = _curves(records, "learning_rate").get("", ([], []))
    rate.plot(steps, values, color="#333333", linewidth=1.2)
    rate.set_ylim(bottom=0)
    rate.set_ylabel("learning rate")
    rate.set_xlabel("step")
    for axes in (losses, rate):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(str(out_png), dpi=150)


def _curves(records: list[dict[str, float]], prefix: str) -> dict[str, tuple[list[float], list[float]]]:
    """Steps and values by modality ('' is the whole) of the fields that are `prefix` or begin with it."""
    curves: dict[str, tuple[list[float], list[float]]] = {}
    for record in records:
        for field, value in record.items():
            if field == prefix or field.startswith(f"{prefix}_"):
                steps, values = curves.setdefault(field[len(prefix) + 1 :], ([], []))
                steps.append(record["step"])
                values.append(value)
    return curves


def _smoothed(values: list[float]) -> list[float]:
    """An exponential mean over about a fiftieth of the curve, without the bias of its start; nan is stepped over."""
    decay = 1 - 1 / max(len(values) / 50, 1)
    total = weight = 0.0
    smooth = []
    for value in values:
        if value == value:  # not nan
            # Both sums decay alike, so that their ratio is a mean from the first value on (as Adam's correction).
            total, weight = decay * total + (1 - decay) * value, decay * weight + (1 - decay)
        smooth.append(total / weight if weight else float("nan"))
    return smooth
