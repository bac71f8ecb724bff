"""A build: records through worker processes, without duplicates, into shards, one journal entry a shard."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from megatron_gemini.building.duplicates import Duplicates
from megatron_gemini.building.examine import Examined, Examiner
from megatron_gemini.building.journal import VALIDATION, Dropped, Journal, JournalEntry, KeptSample
from megatron_gemini.building.parallel import Workers
from megatron_gemini.building.records import Record
from megatron_gemini.data.sources.index_cache import write_index
from megatron_gemini.data.sources.shard_writer import json_member, write_shard

if TYPE_CHECKING:
    from megatron_gemini.data.samples.decode_json import Json

SLACK = 30.0  # seconds that a record may take beside its download


@dataclass(frozen=True)
class BuildPlan:
    """How a build is made.

    dedup: none, exact or perceptual, and then of how many bits two pictures may differ. validation: the share of the
    samples that is held out.
    """

    examiner: Examiner
    dedup: str = "exact"
    dedup_bits: int = 5
    samples_per_shard: int = 1000
    name: str = "shard"
    validation: float = 0.0

    def __post_init__(self) -> None:
        if self.samples_per_shard < 1:
            raise ValueError(f"--samples-per-shard is {self.samples_per_shard}; it must be 1 or more")
        if not 0 <= self.validation < 1:
            raise ValueError(f"--validation is {self.validation}; it is a share of the samples, from 0 to below 1")

    def holds_out(self, sha256: str) -> bool:
        """Whether a sample is one of validation. By its bytes: the same file is on the same side in every build."""
        return int(sha256[:13], 16) < self.validation * 16**13


def build(
    records: Iterable[Record],
    plan: BuildPlan,
    folder: Path,
    identity: Mapping[str, Json],
    workers: int,
    total: int | None,
) -> list[JournalEntry]:
    """Write `folder/NAME-00000.tar`, ... and return the journal's entries, also of the shards that were there.

    What is held out of the records of a shard stands in a shard of the same name in `folder/validation`.

    identity: inputs and options in plain JSON; a build goes on only where they are the same. total: number of records,
    for the progress bar.
    """
    journal = Journal(folder, identity)
    if journal.is_complete:
        return journal.entries
    duplicates, done = Duplicates(plan.dedup, plan.dedup_bits), 0
    # Samples that are in finished shards count as seen, or a build that goes on would keep other ones.
    for entry in journal.entries:
        done = entry.next_record
        for sample in (*entry.samples, *entry.held_out):
            duplicates.keep(sample.sha256, int(sample.picture, 16))
    rest = itertools.islice(records, done, None)
    limit = SLACK + plan.examiner.fetcher.seconds
    tqdm.monitor_interval = 0  # no thread may run while the workers are forked
    with tqdm(total=total, initial=done, unit=" records", disable=None) as bar:
        results = Workers(plan.examiner, workers, limit).map(rest)
        for entry in _shards(results, duplicates, plan, folder, len(journal.entries), done, bar):
            journal.add(entry)
    return journal.entries


def _shards(
    results: Iterator[tuple[Record, Examined | None]],
    duplicates: Duplicates,
    plan: BuildPlan,
    folder: Path,
    number: int,
    position: int,
    bar: tqdm,
) -> Iterator[JournalEntry]:
    """Entries of the shards, each after it was written, and at the end one of what came after the last."""
    kept, held_out, dropped = list[Examined](), list[Examined](), Dropped()
    for record, found in results:
        position = record.number + 1
        bar.update()
        found = found or Examined(record, "process_lost", f"{record.image[:200]}: its process crashed or took too long")
        # In the parent and in the records' order: which of two duplicates stays does not depend on the workers.
        reason = found.reason or duplicates.reason(found.sha256, found.picture)
        if reason:
            dropped.add(reason, found.detail or record.image[:200])
            continue
        duplicates.keep(found.sha256, found.picture)
        (held_out if plan.holds_out(found.sha256) else kept).append(found)
        # Both sides together, though that makes small shards of validation: a build that goes on begins behind the
        # records of an entry, and none of them may still wait for its shard.
        if len(kept) == plan.samples_per_shard:
            yield _entry(kept, held_out, dropped, folder, f"{plan.name}-{number:05d}.tar", position)
            kept, held_out, dropped, number = [], [], Dropped(), number + 1
    if kept or held_out:
        yield _entry(kept, held_out, dropped, folder, f"{plan.name}-{number:05d}.tar", position)
        dropped = Dropped()
    yield JournalEntry("", 0, 0, position, (), (), dropped)


def _entry(
    kept: list[Examined], held_out: list[Examined], dropped: Dropped, folder: Path, name: str, position: int
) -> JournalEntry:
    shard_bytes, held_out_bytes = _write(kept, folder / name), _write(held_out, folder / VALIDATION / name)
    # The shards are whole on disk; the journal's entry comes after them, so that a kill in between only builds them
    # again.
    samples, others = (
        tuple(
            KeptSample(item.sha256, f"{item.picture:x}", item.width, item.height, len(item.caption), len(item.data))
            for item in side
        )
        for side in (kept, held_out)
    )
    return JournalEntry(name, shard_bytes, held_out_bytes, position, samples, others, dropped)


def _write(kept: list[Examined], path: Path) -> int:
    """Write a shard if there is something for it; returns its bytes."""
    if not kept:
        return 0
    path.parent.mkdir(exist_ok=True)
    # Keyed by the record's number: a name of somebody else's says nothing and may mean anything.
    write_shard(
        path,
        (
            (
                f"{item.record.number:09d}",
                {item.ending: item.data, "txt": item.caption.encode(), "json": json_member(item.metadata())},
            )
            for item in kept
        ),
    )
    write_index(str(path))
    return path.stat().st_size
