"""Every layout trains like one process without DeepSpeed.

The oracle is a plain loop: the serial model, started from the same seed, torch's AdamW, torch's gradient clipping,
the loss as a sum over all rows of the step divided by the sum of the weights. It shares with the layouts only the
model's code and the rule for initial values; ZeRO, DeepSpeed, accumulation, tensor parallelism, our norm and our
clipping are all absent. The bound binds on most steps (asserted), one row has text only, rows have unequal targets.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_gemini.checkpoint.pieces import WEIGHT, PieceReader
from megatron_gemini.models.gemini import Gemini
from megatron_gemini.parallel.layers import Layers
from megatron_gemini.parallel.parameters import initialize
from megatron_gemini.parallel.topology import Topology
from tests.distributed.rows import CONFIG, LAYOUT, rows, total_weight
from tests.distributed.train_layouts import STEPS

ROOT = Path(__file__).parents[2]
ZERO = [
    {"zero": 0},
    {"zero": 1},
    {"zero": 1, "offload": "cpu"},
    {"zero": 2},
    {"zero": 2, "offload": "cpu"},
    {"zero": 3},
    {"zero": 3, "offload": "cpu"},
    {"zero": 3, "offload": "cpu", "parameters": "cpu"},
]


def launch(ranks: int, layouts: list[dict], out: Path, elsewhere: str = "") -> list[dict]:
    """What `train_layouts` found on `ranks` gloo ranks; elsewhere: a checkpoint to go on from as well."""
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += ["-m", "tests.distributed.train_layouts", str(out), json.dumps(layouts)]
    command += [elsewhere] if elsewhere else []
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def oracle() -> tuple[list[list[float]], dict[str, torch.Tensor]]:
    """([loss, norm] a step, final weights) of the plain loop."""
    model = Gemini(CONFIG, LAYOUT, Layers(Topology.serial()))
    initialize(model, CONFIG.train.seed)
    matrices = [p for n, p in model.named_parameters() if p.ndim >= 2 and "embedding" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim < 2 or "embedding" in n]
    groups = [
        {"params": matrices, "weight_decay": CONFIG.optimizer.weight_decay},
        {"params": others, "weight_decay": 0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-4)
    curve = []
    for step in range(STEPS):
        everything = rows(step)
        loss = sum(model(row).loss for row in everything) / total_weight(everything)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CONFIG.engine.gradient_clipping)
        optimizer.step()
        curve.append([loss.item(), norm.item()])
    assert sum(norm > CONFIG.engine.gradient_clipping for _, norm in curve) > STEPS // 2
    return curve, {name: p.detach() for name, p in model.named_parameters()}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """Results by "ranks/tensor/zero/offload/parameters", two launches for all."""
    folder, found, elsewhere = tmp_path_factory.mktemp("layouts"), {}, ""
    for tensor in (1, 2):
        layouts = [{"tensor": tensor, **zero} for zero in ZERO]
        for result in launch(2, layouts, folder / f"tensor{tensor}.json", elsewhere):
            found[name(result["layout"])] = result
        elsewhere = found[name({"tensor": 1, **ZERO[-2]})]["checkpoint"]
    return found


def name(layout: dict) -> str:
    return "/".join(f"{key}={value}" for key, value in layout.items())


@pytest.mark.parametrize("layout", [name({"tensor": t, **zero}) for t in (1, 2) for zero in ZERO])
def test_a_layout_trains_like_the_plain_loop(layout: str, results: dict, oracle: tuple) -> None:
    curve, weights = oracle
    torch.testing.assert_close(torch.tensor(results[layout]["curve"]), torch.tensor(curve), rtol=1e-5, atol=1e-6)
    reader = PieceReader(Path(results[layout]["checkpoint"]))
    assert set(reader.names()) == set(weights)
    for parameter, expected in weights.items():
        found = reader.read(WEIGHT, parameter)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-2 * 1e-2, msg=lambda m, p=parameter: f"{p}: {m}")


@pytest.mark.parametrize("layout", [name({"tensor": t, **zero}) for t in (1, 2) for zero in ZERO])
def test_a_resumed_run_goes_on_to_the_bit(layout: str, results: dict) -> None:
    result = results[layout]
    assert [[x.hex() for x in row] for row in result["resumed"]] == [[x.hex() for x in row] for row in result["onward"]]


@pytest.mark.parametrize("layout", [name({"tensor": 2, **zero}) for zero in ZERO])
def test_a_checkpoint_of_another_layout_goes_on_the_same(layout: str, results: dict) -> None:
    """From two data-parallel ranks under ZeRO-3 with offload to two tensor-parallel ranks under any stage."""
    expected = results[name({"tensor": 1, **ZERO[-2]})]["onward"]
    torch.testing.assert_close(torch.tensor(results[layout]["moved"]), torch.tensor(expected), rtol=1e-5, atol=1e-6)
