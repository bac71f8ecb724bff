"""Joining the job's process group."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import torch
from megatron_gemini.engine.distributed import join, leave
join(torch.device("cpu"))
leave()
"""


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="shared memory is elsewhere on this system")
def test_no_shared_memory_stays_behind():
    port = "29876"
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "MASTER_PORT": port, "MASTER_ADDR": "127.0.0.1"}
    subprocess.run([sys.executable, "-c", CODE], env=environment, check=True, capture_output=True)
    assert not list(Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"))
