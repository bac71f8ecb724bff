"""What a build kept and left out: counts by reason, a table, and plots of sizes and lengths."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypedDict

import numpy as np

from megatron_gemini.building.journal import VALIDATION, Dropped, JournalEntry, KeptSample

_QUANTILES = {"least": 0.0, "5%": 0.05, "median": 0.5, "95%": 0.95, "most": 1.0}


class Reason(TypedDict):
    """How many records were left out for a reason, and what was said of the first."""

    count: int
    first: str


class Report(TypedDict):
    """Plain JSON: records read, samples kept (those that are held out among
    them), by shard, what was left out by reason, quantiles of sizes,
    and the files that are no records."""

    records: int
    kept: int
    held_out: int
    shards: dict[str, int]
    bytes: int
    dropped: dict[str, Reason]
    sizes: dict[str, dict[str, int]]
    passed_over: dict[str, int]


def summary(entries: Sequence[JournalEntry], passed_over: Mapping[str, int]) -> Report:
    """What came of all records. passed_over: files that are no records, by kind."""
    dropped = Dropped()
    for entry in entries:
        dropped.merge(entry.dropped)
    samples = all_samples(entries)
    shards = {entry.shard: len(entry.samples) for entry in entries if entry.samples}
    held_out = {f"{VALIDATION}/{entry.shard}": len(entry.held_out) for entry in entries if entry.held_out}
    most_common = Counter(dropped.counts).most_common()
    sizes = {
        name: {each: int(np.quantile(values, share, method="nearest")) for each, share in _QUANTILES.items()}
        for name, values in (columns(samples) if samples else {}).items()
    }
    return Report(
        records=entries[-1].next_record,
        kept=len(samples),
        held_out=sum(held_out.values()),
        shards=shards | held_out,
        bytes=sum(sample.bytes for sample in samples),
        dropped={reason: Reason(count=count, first=dropped.first[reason]) for reason, count in most_common},
        sizes=sizes,
        passed_over=dict(passed_over),
    )


def all_samples(entries: Sequence[JournalEntry]) -> list[KeptSample]:
    """Those that are kept, held out or not."""
    return [sample for entry in entries for sample in (*entry.samples, *entry.held_out)]


def columns(samples: Sequence[KeptSample]) -> dict[str, np.ndarray]:
    """What is worth a plot, int64[samples] each."""
    table = np.array([(s.width, s.height, s.characters, s.bytes) for s in samples], np.int64).reshape(-1, 4)
    return dict(zip(("width", "height", "characters", "bytes"), table.T, strict=True))


def table(report: Report) -> str:
    """The report for a reader: lines of counts with their share, then the sizes."""
    records = report["records"]
    lines = [f"{'records':<24}{records:>12,}", f"{'kept':<24}{report['kept']:>12,}  {_share(report['kept'], records)}"]
    if report["held_out"]:
        lines.append(
            f"{'  held out':<24}{report['held_out']:>12,}  {_share(report['held_out'], report['kept'])} of them"
        )
    for reason, found in report["dropped"].items():
        lines.append(f"  {reason:<22}{found['count']:>12,}  {_share(found['count'], records)}  {found['first'][:100]}")
    if report["passed_over"]:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in report["passed_over"].items())
        lines.append(
            f"{'passed over':<24}{sum(report['passed_over'].values()):>12,}  no pictures by their ending: {kinds}"
        )
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
    # Logarithms: sizes of pictures from the web span three powers of ten.
    axes[0].scatter(values["width"], values["height"], s=4, alpha=0.3, color="#0072b2")
    axes[0].set(xlabel="width (pixels)", ylabel="height (pixels)", xscale="log", yscale="log")
    labeled = (
        (axes[1], values["width"] / values["height"], "aspect (width / height)"),
        (axes[2], values["characters"], "caption (characters)"),
        (axes[3], values["bytes"] / 1000, "file (kB)"),
    )
    for axis, column, label in labeled:
        axis.hist(column, bins=np.geomspace(column.min() * 0.99, column.max() * 1.01, 41), color="#0072b2")
        axis.set(xlabel=label, ylabel="samples", xscale="log")
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(str(path), dpi=110)


def _share(count: int, of: int) -> str:
    return f"{count / max(of, 1):6.1%}"
