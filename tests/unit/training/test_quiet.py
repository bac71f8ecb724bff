"""Known noise goes, everything else stays: seen in a process that imports the noisy packages."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROGRAM = """
import warnings
from megatron_gemini.training.quiet import quiet_warnings
quiet_warnings()
quiet_warnings()
import deepspeed, torch
import megatron.core.distributed.fsdp.src.megatron_fsdp.mixed_precision
from deepspeed.utils import logger
store = torch.distributed.HashStore()
torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
gather = lambda: torch.distributed.all_gather_into_tensor(torch.zeros(1), torch.zeros(1))
gather()
logger.info("DEEPSPEED INFO")
logger.warning("DEEPSPEED WARNING")
warnings.warn("OTHER FUTURE", FutureWarning)
warnings.warn("OTHER USER", UserWarning)
with warnings.catch_warnings(record=True) as made:
    warnings.resetwarnings()
    gather()
print("UNFILTERED", [str(warning.message) for warning in made])
"""


def test_known_noise_is_silent_and_real_warnings_stay():
    torch = pytest.importorskip("torch")
    pytest.importorskip("deepspeed")
    pytest.importorskip("megatron.core")
    environment = {key: value for key, value in os.environ.items() if key != "DS_ACCELERATOR"}
    command = [sys.executable, "-c", PROGRAM]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    shown, _, unfiltered = (result.stderr + result.stdout).partition("UNFILTERED")
    noise = ["is deprecated", "Transformer Engine and Apex"]
    noise += ["Setting accelerator to CPU"] if torch.version.cuda is None else []
    assert [line for line in shown.splitlines() if any(known in line for known in noise)] == []
    assert [real for real in ("DEEPSPEED WARNING", "OTHER FUTURE", "OTHER USER") if real not in shown] == []
    assert "DEEPSPEED INFO" not in shown
    if tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13):
        assert "is deprecated" in unfiltered  # otherwise the filter's message has gone out of date
