"""Worker processes change no row; one that crashes or hangs costs the sample it was at, now and after a resume."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from megatron_gemini.config.data import SourceConfig
from megatron_gemini.data.loading.loader import Loader
from megatron_gemini.data.loading.workers import _Running
from megatron_gemini.data.packing.wire import from_bytes, parse_header, to_bytes
from tests.processes import HANGS_AFTER, alive_at_last, wait_until
from tests.tiny_shards import FORM, LAYOUT, Characters, run_config, sample, texts, write_tar
from tests.unit.data.test_loader import content, steps

ROOT = Path(__file__).parents[3]


class Unruly(Characters):
    """Ends its process at texts with the word "crash", and never returns from those with "hang"."""

    def encode(self, text):
        if "crash" in text:
            os.kill(os.getpid(), signal.SIGKILL)
        while "hang" in text:
            time.sleep(1)
        return super().encode(text)


def load(config, rank=0, size=1, tokenizer=None):
    return Loader(config, rank, size, LAYOUT, tokenizer or Characters(), FORM)


def workers():
    """The worker processes of this one, by the name of what they run."""
    children = psutil.Process().children(recursive=True)
    return [child for child in children if child.status() != psutil.STATUS_ZOMBIE and "forkserver" in child_name(child)]


def child_name(child):
    try:
        return " ".join(child.cmdline())
    except psutil.Error:
        return ""


def left_of(before):
    """Processes beyond those of `before`, once they have had the time to end."""
    wait_until(lambda: not set(workers()) - set(before))
    return set(workers()) - set(before)


@pytest.fixture(scope="module")
def shard(tmp_path_factory):
    return write_tar(tmp_path_factory.mktemp("w") / "all.tar", ((f"s{i}", sample(i)) for i in range(9)))


def mixture(shard, **data):
    sources = [SourceConfig(shards=shard, task=task) for task in ("caption", "transcribe", "generate", "text")]
    return run_config(sources, rows_per_step=4, row_tokens=96, **data)


def test_a_row_survives_the_way_through_bytes(shard):
    for batch in load(mixture(shard)).next().values():
        header, body = to_bytes(batch, {"state": [1, "a"]})
        parsed = parse_header(header)
        again = from_bytes(parsed, torch.frombuffer(body, dtype=torch.uint8))
        assert content(again) == content(batch)
        assert parsed["extra"] == {"state": [1, "a"]}


def test_workers_change_no_row_and_go_on_from_any_state(shard):
    expected = steps([load(mixture(shard))], 6)
    with load(mixture(shard, workers=3)) as first:
        assert steps([first], 2) == expected[:8]
        state = json.loads(json.dumps(first.state()))
    plain = load(mixture(shard))
    plain.load_state(state)
    assert steps([plain], 4) == expected[8:]
    both = [load(mixture(shard, workers=1, prefetch=2), rank, 2) for rank in range(2)]
    for loader in both:
        loader.load_state(state)
    assert steps(both, 4) == expected[8:]
    for loader in both:
        loader.close()


def test_a_worker_is_waited_for_before_its_pipes_are_closed():
    """So that none is left, nor writes to a closed pipe, once the loader is closed."""
    calls = []
    names = {"process": ("kill", "join"), "rows": ("close",), "lifeline": ("close",)}
    parts = {
        part: SimpleNamespace(**{name: lambda at=f"{part}.{name}": calls.append(at) for name in methods})
        for part, methods in names.items()
    }
    _Running(**parts, now_decoding=None).end()
    assert calls == ["process.kill", "process.join", "rows.close", "lifeline.close"]


def unruly_shard(path, bad):
    words = {number: bad.get(number, "good") for number in range(30)}
    return write_tar(path, ((f"s{number:02}", {"txt": f"{word} {number}".encode()}) for number, word in words.items()))


def test_a_crash_or_a_hang_costs_one_sample_which_no_resume_tries_again(tmp_path):
    path = unruly_shard(tmp_path / "t.tar", {7: "crash", 12: "hang", 20: "crash"})
    source = SourceConfig(shards=path, task="text", name="t")
    config = run_config([source], lanes=2, look_ahead=2, workers=2, sample_seconds=0.5, prefetch=1, row_tokens=32)
    seen, before = Counter(), workers()
    with load(config, tokenizer=Unruly()) as loader:
        state = loader.state()
        while min(lane["drawn"]["t"] for lane in state.values()) < 15:
            seen.update(key for batch in loader.next().values() for key in batch.samples)
            state = json.loads(json.dumps(loader.state()))
        skipped = loader.skipped
        rest = content(loader.next()[0])
    assert not left_of(before)
    assert skipped[("t", "worker_crashed")] >= 2
    assert skipped[("t", "too_slow")] >= 1
    assert not {"t/s07", "t/s12", "t/s20"} & set(seen)
    # Whoever goes on from the state, here without workers, where nothing could end a hang, reads the same rows; the
    # tokenizer shows that none of the samples given up so far is tried.
    plain = load(run_config([source], lanes=2, look_ahead=2, row_tokens=32))
    plain.load_state(state)
    assert plain.skipped == skipped
    assert content(plain.next()[0]) == rest


class KilledOnce(Characters):
    """The first process that encodes an innocent text is killed, as by a machine that runs out of memory."""

    def __init__(self, folder):
        self.folder = folder

    def encode(self, text):
        if "innocent" in text and not os.path.exists(f"{self.folder}/{text}"):
            open(f"{self.folder}/{text}", "x").close()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().encode(text)


def test_a_process_that_is_killed_once_blames_no_sample(tmp_path):
    path = unruly_shard(tmp_path / "t.tar", {3: "innocent", 9: "innocent"})
    source = SourceConfig(shards=path, task="text", name="t", epochs=1)
    config = run_config([source], lanes=1, look_ahead=2, workers=1, row_tokens=32, rows_per_step=1)
    seen = set()
    with load(config, tokenizer=KilledOnce(str(tmp_path))) as loader, pytest.raises(ValueError, match="is used up"):
        while True:
            seen |= {key for batch in loader.next().values() for key in batch.samples}
    assert {"innocent 3", "innocent 9"} <= set(os.listdir(tmp_path))
    assert len(seen) == 30
    assert not loader.skipped


class KilledAlways(Characters):
    """Every process is killed at every text, and the next one that is made skips what this one was at."""

    def encode(self, text):
        os.kill(os.getpid(), signal.SIGKILL)


def test_processes_that_are_killed_wherever_they_are_end_the_run(tmp_path):
    config = run_config([SourceConfig(shards=texts(tmp_path / "t.tar", 9), task="text")], workers=1, lanes=1)
    expected = r"a data worker was ended 3 times \(status -9\).*does the machine have enough memory"
    with load(config, tokenizer=KilledAlways()) as loader, pytest.raises(ValueError, match=expected):
        loader.next()


def test_a_sample_quarantined_ahead_of_the_rows_handed_out_is_in_the_state(tmp_path):
    path = unruly_shard(tmp_path / "t.tar", {})
    config = run_config([SourceConfig(shards=path, task="text", name="t")], lanes=1, look_ahead=2, row_tokens=32)
    straight = load(config)
    state = straight.state()
    position = 3
    told = {"0": {**state["0"], "quarantined": [["t", position, "too_slow"]]}}
    resumed = load(config)
    resumed.load_state(told)
    assert resumed.state()["0"]["quarantined"] == [["t", position, "too_slow"]]
    wanted = f"t/{straight.sources[0].shards.key(straight.sources[0].order.at(position)[1])}"
    keys = [
        [key for _ in range(4) for batch in loader.next().values() for key in batch.samples]
        for loader in (straight, resumed)
    ]
    assert wanted in keys[0]
    assert wanted not in keys[1]
    assert set(keys[0]) - {wanted} <= set(keys[1])
    assert resumed.skipped == {("t", "too_slow"): 1}
    assert resumed.state()["0"]["quarantined"] == []


def test_workers_that_cannot_read_say_why_in_the_rank(tmp_path):
    samples = [(f"s{i}", {"txt": b"text" if i % 10 == 0 else b"long" * 100}) for i in range(400)]
    shard = write_tar(tmp_path / "x.tar", samples)
    config = run_config([SourceConfig(shards=shard, task="text", name="t")], max_bad_share=0.05, workers=2)
    with load(config) as loader, pytest.raises(ValueError, match=r"data\.max_bad_share \(0\.05\):\n  t  too_long"):
        for _ in range(100):
            loader.next()


class Nothing(Characters):
    """A tokenizer that no other process can make, as on a machine without memory."""

    def __setstate__(self, state):
        os.kill(os.getpid(), signal.SIGKILL)

    def __getstate__(self):
        return {"a": 1}


def test_workers_that_never_start_end_the_run(tmp_path):
    config = run_config([SourceConfig(shards=texts(tmp_path / "t.tar", 9), task="text")], workers=1)
    with (
        load(config, tokenizer=Nothing()) as loader,
        pytest.raises(ValueError, match="a data worker was ended 3 times"),
    ):
        loader.next()


class Tires(Characters):
    """Encodes twenty texts, and hangs at the next."""

    left = 20

    def encode(self, text):
        self.left -= 1
        while self.left < 0:
            time.sleep(1)
        return super().encode(text)


ORPHANS = """
import os, signal, sys
from tests.unit.data.test_workers import Tires, load, run_config, SourceConfig
def main():
    source = SourceConfig(shards=sys.argv[1], task="text", name="t")
    loader = load(run_config([source], workers=2, prefetch=1, lanes=2), tokenizer=Tires())
    loader.next()
    print("ready", flush=True)
    if sys.argv[2] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
if __name__ == "__main__":
    main()
"""


@pytest.mark.parametrize("end", ["kill", pytest.param("exit", marks=pytest.mark.long)])
def test_no_process_outlives_its_rank_not_even_one_that_hangs(tmp_path, end):
    script = tmp_path / "orphans.py"
    script.write_text(ORPHANS)
    command = [sys.executable, str(script), texts(tmp_path / "t.tar", 30), end]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    child = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    ready = child.stdout.readline()
    session = [process for process in psutil.process_iter() if _session(process) == child.pid]
    assert child.wait(HANGS_AFTER) == (-signal.SIGKILL if end == "kill" else 0), child.stderr.read()
    assert ready == "ready\n"
    assert len(session) >= 4  # the rank, the server of its workers, and two workers
    assert not alive_at_last(session)


def _session(process):
    try:
        return os.getsid(process.pid)
    except OSError:
        return 0
