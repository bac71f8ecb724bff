"""A job whose ranks are killed at any moment goes on with the same rows, on other numbers of ranks and workers.

The ranks are processes that do with the loader what training does: take a step's rows, then, all together, save the
states of the lanes. What they consume after the last state is lost with them and must come again.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from megatron_gemini.config.data import SourceConfig
from megatron_gemini.contracts import Batch
from megatron_gemini.data.loading.loader import Loader
from tests.end_to_end.launches import ROOT, environment
from tests.tiny_shards import FORM, LAYOUT, Characters, run_config, write_tar

ROWS, LANES, STEPS = 12, 10, 60  # lanes that three and four ranks do not divide
SHARDS, SAMPLES = 3, 40


def make(folder: Path, rank: int, ranks: int, workers: int) -> Loader:
    sources = [SourceConfig(shards=f"{folder}/t-*.tar", task="text", name="t")]
    data = {"lanes": LANES, "workers": workers, "prefetch": 1, "row_tokens": 24, "look_ahead": 2}
    return Loader(run_config(sources, ROWS, **data), rank, ranks, LAYOUT, Characters(), FORM)


def ids(batch: Batch) -> list[str]:
    return batch.samples


def rank_process(folder: Path, rank: int, ranks: int, workers: int) -> None:
    """One rank: rank 0 publishes a step's state and rows once every rank has written its own."""
    saved = sorted(folder.glob("step-*.json"))
    with make(folder, rank, ranks, workers) as loader:
        if saved:
            loader.load_state(json.loads(saved[-1].read_text())["lanes"])
        for step in range(len(saved), STEPS):
            batches = loader.next()
            mine = {"lanes": loader.state(), "rows": {number: ids(batch) for number, batch in batches.items()}}
            write(folder / f"part-{ranks}-{workers}-{step:03}-{rank}.json", mine)
            whole = folder / f"step-{step:03}.json"
            if rank == 0:
                parts = [folder / f"part-{ranks}-{workers}-{step:03}-{other}.json" for other in range(ranks)]
                wait_for(parts)
                found = [json.loads(part.read_text()) for part in parts]
                lanes = {number: state for part in found for number, state in part["lanes"].items()}
                rows = {int(number): keys for part in found for number, keys in part["rows"].items()}
                write(whole, {"lanes": lanes, "rows": [rows[number] for number in range(ROWS)]})
            wait_for([whole])
            time.sleep(0.02)  # as a step of training takes its time


def write(path: Path, value: object) -> None:
    beside = path.with_suffix(".partial")
    beside.write_text(json.dumps(value))
    os.replace(beside, path)


def wait_for(paths: list[Path]) -> None:
    while not all(path.exists() for path in paths):
        time.sleep(0.002)


def start(folder: Path, rank: int, ranks: int, workers: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tests.end_to_end.test_data_resume", *map(str, (folder, rank, ranks, workers))]
    return subprocess.Popen(command, cwd=ROOT, env=environment(), start_new_session=True)


def uninterrupted(folder: Path) -> list[list[str]]:
    with make(folder, 0, 1, 0) as loader:
        return [ids(batch) for _ in range(STEPS) for batch in loader.next().values()]


# (ranks, workers) of one run after the other; all but the last are killed.
SHORT = [(2, 1), (3, 0), (1, 3)]
LONG = [(1, 1), (2, 3), (3, 1), (4, 0), (1, 0), (4, 3), (2, 0), (3, 3), (4, 1), (1, 3)]


@pytest.mark.parametrize("seed", [pytest.param(0, id="short"), pytest.param(1, marks=pytest.mark.long, id="long")])
def test_a_job_killed_at_any_moment_consumes_what_an_uninterrupted_one_does(tmp_path: Path, seed: int) -> None:
    for shard in range(SHARDS):
        samples = ((f"{shard}-{number:02}", {"txt": b"five%d" % shard}) for number in range(SAMPLES))
        write_tar(tmp_path / f"t-{shard}.tar", samples)
    moments, layouts = random.Random(seed), LONG if seed else SHORT
    for ranks, workers in layouts[:-1]:
        before = len(list(tmp_path.glob("step-*.json")))
        processes = [start(tmp_path, rank, ranks, workers) for rank in range(ranks)]
        enough = tmp_path / f"step-{before + moments.randrange(len(layouts) // 3 + 1):03}.json"
        while not enough.exists():
            assert all(process.poll() is None for process in processes)
            time.sleep(0.002)
        time.sleep(moments.random() * 0.05)
        for process in moments.sample(processes, len(processes)):
            process.send_signal(signal.SIGKILL)
            process.wait()
    ranks, workers = layouts[-1]
    processes = [start(tmp_path, rank, ranks, workers) for rank in range(ranks)]
    assert [process.wait() for process in processes] == [0] * ranks
    found = [json.loads((tmp_path / f"step-{step:03}.json").read_text())["rows"] for step in range(STEPS)]
    rows = [row for step in found for row in step]
    assert rows == uninterrupted(tmp_path)
    # Rows of three documents of one size from each lane in turn: a whole number of positions, epoch after epoch.
    seen = Counter(key for row in rows for key in row)
    assert seen.total() == 3 * ROWS * STEPS
    assert len(seen) == SHARDS * SAMPLES
    assert max(seen.values()) - min(seen.values()) <= 1


if __name__ == "__main__":
    folder, *numbers = sys.argv[1:]
    rank_process(Path(folder), *map(int, numbers))
