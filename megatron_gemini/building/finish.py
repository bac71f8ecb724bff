"""The end of a build: its report, its pictures, and the shards' manifest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from megatron_gemini.building.contact_sheet import contact_sheet
from megatron_gemini.building.journal import VALIDATION, JournalEntry
from megatron_gemini.building.report import all_samples, plot, summary, table
from megatron_gemini.data.sources.shard_writer import write_json
from megatron_gemini.data.sources.shards import Shards

if TYPE_CHECKING:
    from megatron_gemini.data.samples.decode_json import Json


def finish(
    entries: Sequence[JournalEntry], folder: Path, options: Mapping[str, Json], passed_over: Mapping[str, int]
) -> str:
    """Write report.json, sizes.png and samples.png and return the report as a table.

    passed_over: how many files were not even looked at, by kind. Raises ValueError with that table when no record was
    of use.
    """
    # From the journal and not from this run's records: most of the build may have been made by runs before.
    report = summary(entries, passed_over)
    write_json(folder / "report.json", {"options": dict(options), **cast("dict[str, Json]", report)})
    if not report["kept"]:
        raise ValueError(f"no record can be used, so there is no shard:\n{table(report)}")
    plot(all_samples(entries), folder / "sizes.png")
    paths = [str(folder / entry.shard) for entry in entries if entry.samples]
    held_out = [str(folder / VALIDATION / entry.shard) for entry in entries if entry.held_out]
    contact_sheet(Shards(paths + held_out)).save(folder / "samples.png")
    return (
        f"{table(report)}\n\n{len(paths)} shards in {folder}, "
        + (f"{len(held_out) or 'none'} in {folder / VALIDATION}, " if options.get("validation") else "")
        + "and report.json, sizes.png, samples.png"
    )
