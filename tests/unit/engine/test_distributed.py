"""Joining and leaving the job's process group."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.end_to_end.launches import free_port

CODE = """
import torch
from megatron_gemini.engine.distributed import join, leave
join(torch.device("cpu"))
leave()
import deepspeed.comm.comm
print("operator:", getattr(deepspeed.comm.comm.cdb, "shm_comm_op", None))
"""


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="shared memory is elsewhere on this system")
def test_no_operator_is_compiled_to_join_and_no_shared_memory_stays_behind(tmp_path: Path):
    port = str(free_port())
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "MASTER_PORT": port, "MASTER_ADDR": "127.0.0.1"}
    environment["TORCH_EXTENSIONS_DIR"] = str(tmp_path)
    done = subprocess.run([sys.executable, "-c", CODE], env=environment, check=True, capture_output=True)
    assert b"operator: None" in done.stdout and not list(tmp_path.iterdir())
    assert not list(Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"))


# Gloo's threads are the last to hold the tensors, wait for the interpreter, and get it when that is being torn down.
# What is registered first runs last, and nothing behind it lets them have the interpreter before. Twenty threads, since
# some get it while the others are begun, as on one core.
ENDING = """
import atexit, ctypes, sys, time
@atexit.register
def leave_waiting():
    sys.setswitchinterval(60)
    for group in groups:
        dist.all_reduce(torch.ones(3), group=group, async_op=True)
    ctypes.PyDLL(None).usleep(1_000_000)  # a PyDLL's function keeps the interpreter's lock
import torch, torch.distributed as dist
from megatron_gemini.engine.distributed import end_process, join
class Slow:
    def __del__(self, sleep=time.sleep):
        sleep(0.5)
join(torch.device("cpu"))
slow, groups = Slow(), [dist.new_group() for _ in range(20)]
atexit.register(print, "atexit ran")
end_process(7)
"""


def test_a_rank_that_ends_is_not_aborted_by_its_last_collective():
    """Ended by `sys.exit` instead, torch aborts it: always on idle cores, now and then on busy ones."""
    done = subprocess.run(
        [sys.executable, "-c", ENDING], env={**os.environ, "DS_ACCELERATOR": "cpu"}, capture_output=True, check=False
    )
    assert done.returncode == 7, done.stderr.decode()
    assert b"atexit ran" in done.stdout
