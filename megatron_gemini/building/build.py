"""A build: records through worker processes, without duplicates, into shards, one journal entry a shard."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from megatron_gemini.building.duplicates import Duplicates
from megatron_gemini.building.examine import Examined, Examiner
from megatron_gemini.building.journal import Dropped, Journal, JournalEntry, KeptSample
from megatron_gemini.building.parallel import Workers
from megatron_gemini.building.records import Record
from megatron_gemini.config.schema import Plain
from megatron_gemini.data.sources.index_cache import write_index
from megatron_gemini.data.sources.shard_writer import Sample, json_member, write_shard

SLACK = 30.0  # seconds that a record may take beside its download


@dataclass(frozen=True)
class BuildPlan:
    """How a build is made. dedup: none, exact or perceptual, and then of how many bits two pictures may differ."""

    examiner: Examiner
    dedup: str = "exact"
    dedup_bits: int = 5
    samples_per_shard: int = 1000
    name: str = "shard"

    def __post_init__(self) -> None:
        if self.samples_per_shard < 1:
            raise ValueError(f"--samples-per-shard is {self.samples_per_shard}; it must be 1 or more")


def build(
    records: Iterable[Record],
    plan: BuildPlan,
    folder: Path,
    identity: Mapping[str, Plain],
    workers: int,
    total: int | None,
) -> list[JournalEntry]:
    """Write `folder/NAME-00000.tar`, ... and return the journal's entries, also of the shards that were there.

    identity: inputs and options in plain JSON; a build goes on only where they are the same. total: number of records,
    for the progress bar.
    """
    journal = Journal(folder, identity)
    if journal.is_complete:
        return journal.entries
    duplicates, done = Duplicates(plan.dedup, plan.dedup_bits), 0
    # What an interrupted build has kept counts as seen, or the rest would repeat it.
    for entry in journal.entries:
        done = entry.next_record
        for sample in entry.samples:
            duplicates.keep(sample.sha256, int(sample.picture, 16))
    rest = itertools.islice(records, done, None)
    limit = SLACK + plan.examiner.fetcher.seconds
    tqdm.monitor_interval = 0  # no thread beside the workers' start
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
    kept: list[Examined] = []
    dropped = Dropped()
    for record, found in results:
        position = record.number + 1
        bar.update()
        found = found or Examined(record, "process_lost", f"{record.image[:200]}: its process crashed or took too long")
        # Here and not in the workers: of two alike the first record stays, whichever was examined first.
        reason = found.reason or duplicates.reason(found.sha256, found.picture)
        if reason:
            dropped.add(reason, found.detail or record.image[:200])
            continue
        duplicates.keep(found.sha256, found.picture)
        kept.append(found)
        if len(kept) == plan.samples_per_shard:
            yield _write(kept, dropped, folder, f"{plan.name}-{number:05d}.tar", position)
            kept, dropped, number = [], Dropped(), number + 1
    if kept:
        yield _write(kept, dropped, folder, f"{plan.name}-{number:05d}.tar", position)
        dropped = Dropped()
    # An entry without a shard says that the records are used up: the build is complete.
    yield JournalEntry("", 0, position, (), dropped)


def _write(kept: list[Examined], dropped: Dropped, folder: Path, name: str, position: int) -> JournalEntry:
    path = folder / name
    write_shard(path, map(_sample, kept))
    # Without an index, whoever opens the shard first has to go through all its headers.
    write_index(str(path))
    samples = tuple(
        KeptSample(item.sha256, f"{item.picture:x}", item.width, item.height, len(item.caption), len(item.data))
        for item in kept
    )
    return JournalEntry(name, path.stat().st_size, position, samples, dropped)


def _sample(item: Examined) -> Sample:
    """Keyed by the record's number: a name of somebody else's says nothing and may mean anything."""
    members = {item.ending: item.data, "txt": item.caption.encode(), "json": json_member(item.metadata())}
    return f"{item.record.number:09d}", members
