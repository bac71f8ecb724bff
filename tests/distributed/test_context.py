"""Ranks that divide a row's tokens compute what one process computes of the whole row.

The oracle is the serial model from the same seed, which recomputes nothing; its attention is tested against a dense
float64 reference elsewhere. The rows have documents and bidirectional spans over the borders of the chunks that ranks
are assigned, and one has ranks with nothing but padding. Initial weights are ten times those of training, so that
attention is far from uniform.
"""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_gemini.parallel.context.positions import context_positions
from megatron_gemini.parallel.topology import Topology
from tests.distributed.context_cases import MODELS, PADDED, ROWS, batch, metadata, run
from tests.distributed.rows import T
from tests.ranks import run_ranks

ROOT = Path(__file__).parents[2]
LAYOUTS = {
    2: {"context-2": {"context": 2}, "context-2-again": {"context": 2, "recompute": "selective"}},
    4: {
        "context-4": {"context": 4},
        "tensor": {"tensor": 2, "context": 2},
        "sequence": {"tensor": 2, "sequence": True, "context": 2},
        "sequence-again": {"tensor": 2, "sequence": True, "context": 2, "recompute": "full"},
    },
}
CASES = [
    pytest.param(ranks, layout, model, id=f"{layout}-{model}")
    for ranks, layouts in LAYOUTS.items()
    for layout in layouts
    for model in MODELS
]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """results(ranks): where its launch wrote; launched when first asked for."""
    folder = tmp_path_factory.mktemp("context")

    @functools.cache
    def of(ranks: int) -> Path:
        given = (folder, json.dumps(LAYOUTS[ranks]))
        ended = run_ranks("tests.distributed.context_cases", ranks, *given, log=folder / f"{ranks}.log")
        assert ended.status == 0, ended.output
        return folder

    return of


@functools.cache
def serial(model: str, row: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    stage, sums = run(model, batch(row), Topology.serial())
    return sums, {name: parameter.grad for name, parameter in stage.named_parameters()}


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize(("ranks", "layout", "model"), CASES)
def test_loss_and_gradients_are_those_of_one_process(ranks, layout, model, row, results):
    found = load_file(results(ranks) / f"{layout}-{model}-{row}.safetensors")
    sums, grads = serial(model, row)
    torch.testing.assert_close(found.pop("sums"), sums, rtol=1e-5, atol=1e-5)
    assert {name.removeprefix("grad/") for name in found} == set(grads)
    for name, wanted in grads.items():
        largest = float(wanted.abs().max())
        assert largest > 1e-3, f"{name} has no gradient to compare"
        worst = float((found[f"grad/{name}"] - wanted).abs().max())
        assert worst <= 1e-5 * largest, f"{name}: off by {worst}, largest {largest}"


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_rows_have_documents_and_spans_over_every_chunk_border(ranks):
    """Otherwise the test above could pass with chunks that are independent of each other."""
    segment, span = metadata("spans")
    edges = torch.arange(T // (2 * ranks), T, T // (2 * ranks))
    crossed = span[edges] == span[edges - 1]
    assert (segment[edges] == segment[edges - 1]).sum() >= len(edges) - 1
    assert (crossed & (span[edges] != 0)).sum() >= len(edges) // 2
    own = context_positions(T, Topology(context_size=ranks, context_rank=ranks - 1))
    assert not metadata(PADDED)[0][own].any()


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_row_of_32k_tokens_keeps_a_quarter_on_each_of_4_ranks():
    """But for keys and values of the whole row. A mask or scores of T x T, 4 GiB, would be kept or seen as time."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "tools/bench/long_row.py"), "--tokens", "32768", "--layers", "1"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]  # outputs are those of one process
    kept = {
        line[:16].strip(): float(line.split()[-3]) for line in done.stdout.splitlines() if line.startswith("context")
    }
    keys = float(re.search(r"keys and values\s+\S+\s+(\S+)", done.stdout)[1])
    assert len(kept) == 4
    for rank, share in kept.items():
        assert share < 0.25 + 0.75 * keys + 0.01, f"{rank} keeps {share} of what one process keeps"
