"""What a plan writes is what training and DeepSpeed read."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from megatron_gemini.config.load import read_config
from megatron_gemini.engine.deepspeed_config import decided_values, deepspeed_config
from megatron_gemini.planning.files import deepspeed_settings, write_plan
from megatron_gemini.planning.search import judge
from megatron_gemini.planning.zero_state import BUCKET
from tests.unit.planning.jobs import job, machine

ENGINES = [
    {"zero_stage": 0},
    {"zero_stage": 1, "offload_optimizer": "cpu"},
    {"zero_stage": 2, "precision": "fp32"},
    {"zero_stage": 3, "offload_optimizer": "cpu", "offload_parameters": "cpu"},
]


def contains(whole: dict, part: dict) -> bool:
    """Whether `whole` has all values of `part`, section by section; "auto" agrees with everything."""
    return all(
        contains(whole[key], value) if isinstance(value, dict) else whole[key] in (value, "auto")
        for key, value in part.items()
    )


@pytest.mark.parametrize("engine", ENGINES, ids=str)
def test_the_json_agrees_with_what_the_run_decides_and_the_yaml_reads_back(engine, tmp_path):
    plan = judge(job(8, engine=engine, pipeline=2), machine())
    yaml_path, json_path = write_plan(plan, tmp_path / "plan.yaml")
    config = read_config(yaml_path)
    wanted = dataclasses.replace(plan.job.config.engine, deepspeed_config=str(json_path))
    assert config == dataclasses.replace(plan.job.config, engine=wanted)
    written = json.loads(json_path.read_text())
    decided = decided_values(config, plan.job.microbatches, plan.job.zero.ranks)
    assert contains(written, decided)
    merged = deepspeed_config(config, plan.job.microbatches, plan.job.zero.ranks)  # raises where they contradict
    assert contains(merged, decided)
    if engine["zero_stage"]:
        assert merged["zero_optimization"]["reduce_bucket_size"] == BUCKET


@pytest.mark.parametrize("engine", ENGINES, ids=str)
def test_deepspeed_itself_takes_the_json(engine, tmp_path):
    from deepspeed.runtime.config import DeepSpeedConfig

    plan = judge(job(1, engine=engine), machine())
    yaml_path, _ = write_plan(plan, tmp_path / "plan.yml")
    parsed = DeepSpeedConfig(deepspeed_config(read_config(yaml_path), plan.job.microbatches, 1))
    assert parsed.zero_optimization_stage == engine["zero_stage"]
    assert parsed.gradient_accumulation_steps == plan.job.microbatches


def test_what_the_users_own_json_sets_beside_it_is_kept(tmp_path):
    own = tmp_path / "own.json"
    own.write_text(
        json.dumps(
            {
                "wall_clock_breakdown": True,
                "zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}, "overlap_comm": False},
            }
        )
    )
    plan = judge(job(8, engine={"zero_stage": 1, "deepspeed_config": str(own)}), machine())
    settings = deepspeed_settings(plan)
    assert settings["wall_clock_breakdown"] is True
    assert settings["zero_optimization"]["stage"] == 1
    assert settings["zero_optimization"]["overlap_comm"] is False
    assert "offload_param" not in settings["zero_optimization"]


@pytest.mark.parametrize("name", ["plan.json", "plan", "absent/plan.yaml"])
def test_a_path_that_cannot_be_written_is_refused(name, tmp_path):
    with pytest.raises(ValueError, match="--out"):
        write_plan(judge(job(8), machine()), tmp_path / Path(name))
