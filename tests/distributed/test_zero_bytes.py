"""The state of an engine by formula against what DeepSpeed really holds, at every ZeRO stage, on two ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_gemini.planning.zero_state import ZeroPlan, zero_state

pytestmark = pytest.mark.long
ROOT, RANKS = Path(__file__).parents[2], 2
ENGINES: list[dict[str, Any]] = [
    {"precision": precision, "zero_stage": stage, "offload_optimizer": offload}
    for precision in ("bf16", "fp32")
    for stage, offload in ((0, "none"), (1, "none"), (1, "cpu"), (2, "none"), (2, "cpu"), (3, "none"), (3, "cpu"))
]


@pytest.fixture(scope="module")
def counted(tmp_path_factory) -> list[list[list[int]]]:
    """[bytes, parameters, largest] of every engine, rank by rank."""
    out = tmp_path_factory.mktemp("zero") / "out.json"
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
    command += ["-m", "tests.distributed.zero_bytes", str(out), json.dumps(ENGINES)]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
    return json.loads(out.read_text())


@pytest.mark.parametrize("number", range(len(ENGINES)), ids=lambda n: "-".join(map(str, ENGINES[n].values())))
def test_an_engine_holds_what_the_formula_says(counted, number):
    engine = ENGINES[number]
    plan = ZeroPlan(
        engine["zero_stage"],
        RANKS,
        engine["precision"] == "bf16",
        offload_optimizer=engine["offload_optimizer"] == "cpu",
    )
    for rank in range(RANKS):
        found, parameters, largest = counted[rank][number]
        state = zero_state(parameters, largest, plan)
        assert state.gpu.total + state.host.total == pytest.approx(found, rel=0.05)
        assert (state.host.total > 0) == plan.offload_optimizer
