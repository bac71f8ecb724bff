"""What tensor- and context-parallel ranks send is what docs/design.md says, and less than megatron-core's sends."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SMALL = ["--tokens", "16", "--width", "32", "--heads", "4", "--head_width", "8", "--mlp_width", "64"]


@pytest.fixture(scope="module")
def sent():
    """{(part, layout): bytes} of a row with one key/value head on 2 ranks."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "tools/bench/comm.py"), "--ranks", "2", *SMALL]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]  # every count is the formula's
    lines = [line for line in done.stdout.splitlines() if line.split()[-1].replace(",", "").isdigit()]
    return {(line[:22].strip(), line[22:58].strip()): int(line.split()[-1].replace(",", "")) for line in lines}


def test_replicated_keys_cost_no_bytes_of_their_own(sent):
    row = 16 * 32 * 4 // 2
    assert sent["attention", "tensor"] == sent["MLP", "tensor"] == 4 * row
    assert sent["attention", "tensor, dK/dV summed in the layer"] > sent["attention", "tensor"]


@pytest.mark.parametrize("layout", ["tensor", "sequence"])
def test_less_is_sent_than_by_megatron_cores_attention_on_the_same_shapes(sent, layout):
    assert sent["attention", layout] < sent["attention", f"{layout}, megatron-core"]


def test_sequence_parallelism_keeps_less_for_the_backward(sent):
    whole, divided = sent["a layer keeps", "tensor"], sent["a layer keeps", "sequence"]
    inputs = 4 * 16 * 32 * 4  # of attention and MLP, before and after their norms
    assert whole - divided == pytest.approx(inputs / 2, rel=0.1)


def test_context_parallelism_sends_keys_and_values_and_their_gradients_only(sent):
    assert sent["attention", "context"] == 2 * (16 * 2 * 8 * 4 // 2)
    assert sent["MLP", "context"] == 0
