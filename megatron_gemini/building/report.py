"""What a build kept and left out: counts by reason, a table, and plots of sizes and lengths."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

import numpy as np

from megatron_gemini.building.journal import Dropped, JournalEntry, KeptSample

_QUANTILES = {"least": 0.0, "5%": 0.05, "median": 0.5, "95%": 0.95, "most": 1.0}


class Reason(TypedDict):
    """How many records were left out for a reason, and what was said of the first."""

    count: int
    first: str


class Report(TypedDict):
    """What `summary` says. shards: samples of each. dropped: by reason. sizes: quantiles by name."""

    records: int
    kept: int
    shards: dict[str, int]
    bytes: int
    dropped: dict[str, Reason]
    sizes: dict[str, dict[str, int]]


def summary(entries: Sequence[JournalEntry]) -> Report:
    """The report in plain JSON: records read, samples kept, what was left out by reason, and quantiles of sizes."""
    dropped = Dropped()
    for entry in entries:
        dropped.merge(entry.dropped)
    samples = [sample for entry in entries for sample in entry.samples]
    return {
        "records": entries[-1].next_record,
        "kept": len(samples),
        "shards": {entry.shard: len(entry.samples) for entry in entries if entry.shard},
        "bytes": sum(sample.bytes for sample in samples),
        "dropped": {
            reason: {"count": count, "first": dropped.first[reason]}
            for reason, count in Counter(dropped.counts).most_common()
        },
        "sizes": {name: _quantiles(values) for name, values in columns(samples).items()} if samples else {},
    }


def columns(samples: Sequence[KeptSample]) -> dict[str, np.ndarray]:
    """What is worth a plot, int64[samples] each."""
    # Without samples the array has one axis, and no columns to take apart.
    table = np.array([(s.width, s.height, s.characters, s.bytes) for s in samples], np.int64).reshape(-1, 4)
    return dict(zip(("width", "height", "characters", "bytes"), table.T, strict=True))


def table(report: Report) -> str:
    """The report for a reader: lines of counts with their share, then the sizes."""
    records = report["records"]
    lines = [f"{'records':<24}{records:>12,}", f"{'kept':<24}{report['kept']:>12,}  {_share(report['kept'], records)}"]
    for reason, found in report["dropped"].items():
        lines.append(f"  {reason:<22}{found['count']:>12,}  {_share(found['count'], records)}  {found['first'][:100]}")
    if report["sizes"]:
        lines += ["", f"{'':<24}" + "".join(f"{name:>12}" for name in _QUANTILES)]
        for name, values in report["sizes"].items():
            lines.append(f"{name:<24}" + "".join(f"{value:>12,}" for value in values.values()))
    return "\n".join(lines)


def plot(samples: Sequence[KeptSample], path: Path) -> None:
    """A map of widths and heights and three histograms as a PNG."""
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    values = columns(samples)
    figure = Figure(figsize=(11, 6), layout="constrained")
    axes = figure.subplots(2, 2).ravel()
    axes[0].scatter(values["width"], values["height"], s=4, alpha=0.3, color="#0072b2")
    axes[0].set(xlabel="width (pixels)", ylabel="height (pixels)", xscale="log", yscale="log")
    labeled = (
        (axes[1], values["width"] / values["height"], "aspect (width / height)"),
        (axes[2], values["characters"], "caption (characters)"),
        (axes[3], values["bytes"] / 1000, "file (kB)"),
    )
    for axis, column, label in labeled:
        # A little beyond both ends: of samples that are all alike, the bins would have no width.
        axis.hist(column, bins=np.geomspace(column.min() * 0.99, column.max() * 1.01, 41), color="#0072b2")
        axis.set(xlabel=label, ylabel="samples", xscale="log")
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(str(path), dpi=110)


def _quantiles(values: np.ndarray) -> dict[str, int]:
    # Values that there are, and none between two of them: a size in pixels is a whole number.
    return {name: int(np.quantile(values, share, method="nearest")) for name, share in _QUANTILES.items()}


def _share(count: int, of: int) -> str:
    return f"{count / max(of, 1):6.1%}"
