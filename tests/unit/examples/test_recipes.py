"""Every recipe is one that the trainer would accept, on the machine that its header names."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

from megatron_gemini.config.load import load_config
from megatron_gemini.config.run import RunConfig
from megatron_gemini.engine.deepspeed_config import deepspeed_config

ROOT = Path(__file__).resolve().parents[3]
RECIPES = sorted((ROOT / "examples").glob("*/*.yaml"))
PRETRAININGS = sorted((ROOT / "examples").glob("pretrain_*"))
SCRIPTS = sorted(
    path
    for pattern in ("examples/*.sh", "examples/*/*.sh", "examples/*/*.slurm", "tests/*.sh", "tools/*.sh", ".ci/run")
    for path in ROOT.glob(pattern)
)


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def load(path: Path) -> RunConfig:
    from megatron_gemini.models.presets import preset

    return load_config(["--config", str(path)], presets=preset)


def number(text: str, pattern: str) -> int:
    found = re.search(pattern, text)
    assert found, pattern
    return int(found.group(1))


def test_there_are_recipes() -> None:
    assert {path.name for path in PRETRAININGS} == {"pretrain_1b", "pretrain_8b", "pretrain_70b"}
    assert {path.stem for path in RECIPES} == {"image_tokenizer", "pretrain", "run"}


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_a_recipe_loads(path: Path) -> None:
    config = load(path)
    assert config.data.sources
    validation = {source.shards for source in config.data.validation}
    assert not validation & {source.shards for source in config.data.sources}
    assert config.schedule.warmup_steps < config.train.steps


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_a_recipe_has_a_header(path: Path) -> None:
    header = path.read_text().split("\n\n")[0]
    for field in ("command:", "machine:"):
        assert field in header


@pytest.mark.parametrize("folder", PRETRAININGS, ids=name)
def test_the_deepspeed_json_agrees_with_the_recipe(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # as the launch scripts do: the recipe names the JSON from there
    config = load(folder / "run.yaml")
    own = json.loads(Path(config.engine.deepspeed_config).read_text())
    assert own["zero_optimization"]["offload_optimizer"]["device"] == config.engine.offload_optimizer == "cpu"
    assert own["zero_optimization"]["stage"] == config.engine.zero_stage == 3

    job = (folder / "job.slurm").read_text()
    ranks = number(job, r"--nodes=(\d+)") * number(job, r"--ntasks-per-node=(\d+)")
    data_size, rest = divmod(ranks, config.parallel.tensor)
    assert rest == 0
    assert config.train.rows_per_step % data_size == 0
    assert config.data.lanes % data_size == 0

    full = deepspeed_config(config, config.train.rows_per_step // data_size, data_size)
    assert full["gradient_accumulation_steps"] * data_size == full["train_batch_size"] == config.train.rows_per_step
    assert full["bf16"]["enabled"] is True
    assert "auto" not in json.dumps(full)


@pytest.mark.parametrize("path", SCRIPTS, ids=name)
def test_a_script_parses(path: Path) -> None:
    subprocess.run(["bash", "-n", str(path)], check=True)
