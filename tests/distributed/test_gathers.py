"""Breadth-first pipelines gather a stage's ZeRO-3 weights once a pass, however many microbatches go through it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], dict[str, int]]:
    out = tmp_path_factory.mktemp("gathers") / "out.json"
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    command += ["-m", "tests.distributed.gather_counts", str(out)]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return {
        (case["layout"]["schedule"], case["layout"]["virtual_stages"]): case for case in json.loads(out.read_text())
    }


@pytest.mark.parametrize("virtual", [1, 2])
def test_breadth_first_gathers_each_stage_once_forward_and_once_backward(found: dict, virtual: int) -> None:
    assert found["breadth_first", virtual]["4"] == found["breadth_first", virtual]["8"] == 2 * virtual


def test_1f1b_gathers_for_every_microbatch(found: dict) -> None:
    """So that the count above can fail."""
    assert found["1f1b", 1]["8"] > 1.5 * found["1f1b", 1]["4"] > 8
