import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from megatron_gemini.building.parallel import Workers
from tests.processes import alive_at_last, wait_until

ROOT = Path(__file__).parents[3]


def work(item):
    if item == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    if item == 9:
        while True:  # a decoder that never comes back and lets no Python signal handler run
            time.sleep(1)
    return item * item


def test_results_come_in_order_and_only_the_guilty_items_are_lost():
    results = list(Workers(work, 2, 1.0).map(range(14)))
    assert results == [(i, None if i in (5, 9) else i * i) for i in range(14)]


def test_the_stream_is_read_no_further_than_is_under_way():
    taken = []

    def items():
        for i in range(100):
            taken.append(i)
            yield i + 100

    results = Workers(work, 1, 5.0).map(items())
    assert next(results) == (100, 10_000)
    assert len(taken) <= 5
    results.close()


def test_no_worker_outlives_a_parent_that_was_killed(tmp_path):
    code = (
        "import os, time, pathlib\nfrom megatron_gemini.building.parallel import Workers\n"
        f"def note(i): (pathlib.Path({str(tmp_path)!r}) / str(os.getpid())).touch(); time.sleep(0.05); return i\n"
        "for _ in Workers(note, 2, 60.0).map(iter(int, 1)): pass\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    assert wait_until(lambda: len(list(tmp_path.iterdir())) >= 2 or parent.poll() is not None)
    workers = psutil.Process(parent.pid).children()
    assert {int(path.name) for path in tmp_path.iterdir()} <= {worker.pid for worker in workers}
    parent.kill()
    parent.wait()
    assert not alive_at_last(workers)
