"""The end of a build: its report, its pictures, and the shards' manifest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_gemini.building.contact_sheet import contact_sheet
from megatron_gemini.building.journal import JournalEntry
from megatron_gemini.building.report import plot, summary, table
from megatron_gemini.config.schema import Plain
from megatron_gemini.data.sources.shard_writer import write_json
from megatron_gemini.data.sources.shards import Shards


def finish(entries: Sequence[JournalEntry], folder: Path, options: Mapping[str, Plain]) -> str:
    """Write report.json, sizes.png and samples.png and return the report as a table.

    Raises ValueError with that table when no record was of use.
    """
    report = summary(entries)
    write_json(folder / "report.json", {"options": dict(options), **report})
    # The report is there by now; it says why nothing was of use.
    if not report["kept"]:
        raise ValueError(f"no record can be used, so there is no shard:\n{table(report)}")
    plot([sample for entry in entries for sample in entry.samples], folder / "sizes.png")
    paths = [str(folder / entry.shard) for entry in entries if entry.shard]
    contact_sheet(Shards(paths)).save(folder / "samples.png")
    return f"{table(report)}\n\n{len(paths)} shards in {folder}, and report.json, sizes.png, samples.png"
