"""The real training loop in one process against a plain one: no engine, torch's AdamW and torch's clipping.

Every setting that scales something is away from 1: the loss weight of images, the encoders' and connectors' learning
rates, and a clipping bound that binds. The learning rate is worked out here, from what the schedule's document says.
In one step the gradients are not finite. It is skipped, and Adam does not count it, also in the checkpoint from which
the run then goes on.

Engines on several ranks are held by tests/distributed; the settings that pass through the loop alone are held here.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from megatron_gemini.checkpoint.pieces import PieceReader
from megatron_gemini.config.load import load_config
from megatron_gemini.config.run import RunConfig
from megatron_gemini.contracts import Batch, RowFormat, TokenLayout
from megatron_gemini.data.loading.loader import Loader
from megatron_gemini.modalities.code_ranges import code_ranges
from megatron_gemini.modalities.text.tokenizer import TextTokenizer
from megatron_gemini.models.gemini import Gemini
from megatron_gemini.models.heads import NextTokenLoss
from megatron_gemini.models.presets import preset
from megatron_gemini.parallel.parameters import initialize
from megatron_gemini.parallel.tensor.layers import LayerFactory
from megatron_gemini.parallel.topology import Topology
from tests.end_to_end.dataset import settings, write_config, write_data
from tests.end_to_end.launches import ROOT, environment

STEPS, BROKEN, STOPPED = 7, 3, 5  # the step whose gradients are not finite; steps before the run is stopped
STAGES = (0, 2)
PEAK, WARMUP, FINAL = 3e-3, 2, 0.25
BOUND, IMAGE, Z_LOSS, SEED = 0.3, 0.3, 0.05, 5
DECAY, BETAS, EPS = 0.2, (0.8, 0.9), 1e-4
ENCODER_LR = {"vision": 0.25, "audio": 2.0}
CONNECTOR_LR = {"vision": 3.0, "audio": 0.5}


def write_run(data: Path, folder: Path, stage: int) -> Path:
    """The YAML of a run at a ZeRO stage, in a folder of its own."""
    sections = settings(data, folder / "run")
    for name, section in sections["encoders"].items():
        section |= {"lr_scale": ENCODER_LR[name], "connector": {"kind": "linear", "lr_scale": CONNECTOR_LR[name]}}
    sections["objective"] = {"kind": "pretrain", "weights": {"text": 1.0, "image": IMAGE}, "z_loss": Z_LOSS}
    # A large eps, or rounding of a gradient near zero would become a step of Adam.
    sections["optimizer"] = {"lr": PEAK, "eps": EPS, "weight_decay": DECAY, "beta1": BETAS[0], "beta2": BETAS[1]}
    sections["schedule"] = {"kind": "linear", "warmup_steps": WARMUP, "final_ratio": FINAL}
    sections["engine"] = {"zero_stage": stage, "offload_optimizer": "none", "gradient_clipping": BOUND}
    sections["train"] |= {"steps": STEPS, "seed": SEED}
    return write_config(folder / "run.yaml", sections)


def documented_rate(step: int) -> float:
    """`linear` of training/schedule.py: up to the peak over the warm-up, then along a line to the final ratio."""
    begun = step + 1
    if begun <= WARMUP:
        return PEAK * begun / WARMUP
    along = (begun - WARMUP) / (STEPS - WARMUP)
    return PEAK * (1 + (FINAL - 1) * along)


@dataclass
class Run:
    """Figures of every step, and the final weights."""

    losses: list[float]
    norms: list[float]
    rates: list[float]
    skipped: list[int]
    weights: dict[str, torch.Tensor]


def weighted(rows: list[Batch], layout: TokenLayout) -> tuple[float, int]:
    """(sum of the loss weights, number of targets) of a step, from tokens: codes count as `IMAGE`, others 1."""
    total, targets, codes = 0.0, 0, layout.code_range("image")
    for row in rows:
        for target, weight in zip(row.target_T.tolist(), row.weight_T.tolist(), strict=True):
            if weight:
                targets += 1
                total += IMAGE if target in codes else 1.0
    return total, targets


def rate_of(name: str) -> float:
    """As a multiple of a step's."""
    room, _, rest = name.partition(".")
    scales = {"encoders": ENCODER_LR, "connectors": CONNECTOR_LR}.get(room, {})
    return scales.get(rest.split(".")[0], 1.0)


def plain(config: RunConfig) -> Run:
    """The oracle. It shares the model, the rows and the rule for initial values with the real loop."""
    tokenizer = TextTokenizer(config.data.text_model)
    layout = TokenLayout(tokenizer.size, code_ranges(config))
    model = Gemini(config, layout, LayerFactory(Topology.serial()), NextTokenLoss(len(layout.targets), Z_LOSS))
    initialize(model, SEED)
    optimizer = torch.optim.AdamW(
        [
            {"params": [p], "name": n, "weight_decay": DECAY if p.ndim >= 2 and "embedding" not in n else 0.0}
            for n, p in model.named_parameters()
        ],
        betas=BETAS,
        eps=EPS,
    )
    run = Run([], [], [], [], {})
    with Loader(config, 0, 1, layout, tokenizer, RowFormat(target_weights={"text": 1.0, "image": IMAGE})) as loader:
        for step in range(STEPS):
            rows = list(loader.next().values())
            total, targets = weighted(rows, layout)
            assert abs(total - targets) > 1, "without codes the divisor would be the number of targets"
            outputs = [model(row) for row in rows]
            optimizer.zero_grad()
            (sum(output.loss for output in outputs) / total).backward()
            norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), BOUND))
            for group in optimizer.param_groups:
                group["lr"] = documented_rate(step) * rate_of(group["name"])
            if step != BROKEN:
                optimizer.step()
            run.losses.append(float(sum(output.sums["nll"].sum() for output in outputs)) / total)
            run.norms.append(math.nan if step == BROKEN else norm)
            run.rates.append(documented_rate(step))
            run.skipped.append(int(step == BROKEN))
    assert sum(norm > BOUND for norm in run.norms) > STEPS // 2, "a bound that does not bind is not tested"
    run.weights = {name: p.detach() for name, p in model.named_parameters()}
    return run


def read_run(folder: Path) -> Run:
    """What the real loop has left."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    columns = [
        [math.nan if record[name] is None else record[name] for record in records]
        for name in ("loss", "gradient_norm", "learning_rate", "skipped")
    ]
    reader = PieceReader(folder / "checkpoints" / f"step-{STEPS:08}")
    return Run(*columns, {name: reader.weight(name) for name in reader.names()})


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """The runs at two stages, and the plain one."""
    folder = tmp_path_factory.mktemp("loop")
    data = write_data(folder)
    paths = {stage: write_run(data, folder / str(stage), stage) for stage in STAGES}
    command = [
        sys.executable,
        "-m",
        "tests.unit.training.disturbed_runs",
        str(BROKEN),
        str(STOPPED),
        *map(str, paths.values()),
    ]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {f"zero {stage}": read_run(path.parent / "run") for stage, path in paths.items()}
    return found | {"plain": plain(load_config(["--config", str(paths[STAGES[0]])], presets=preset))}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("figure", ["losses", "norms", "rates", "skipped"])
def test_every_step_has_the_figures_of_a_plain_loop(runs: dict[str, Run], stage: int, figure: str) -> None:
    found, expected = (getattr(runs[name], figure) for name in (f"zero {stage}", "plain"))
    assert found == pytest.approx(expected, rel=1e-5, abs=0, nan_ok=True)


@pytest.mark.parametrize("stage", STAGES)
def test_the_final_weights_are_those_of_a_plain_loop(runs: dict[str, Run], stage: int) -> None:
    found, expected = runs[f"zero {stage}"].weights, runs["plain"].weights
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
