"""The settings of a second engine, at another ZeRO stage than the first."""

from __future__ import annotations

import dataclasses
import json

import pytest

from megatron_gemini.config.engine import EngineConfig
from megatron_gemini.config.run import RunConfig
from megatron_gemini.engine.deepspeed_config import deepspeed_config
from megatron_gemini.engine.settings import LIVE, at_stage, most_kept, second_engine, section, zero_stage


def settings_of(**engine: object) -> dict:
    config = RunConfig(engine=EngineConfig(**engine))
    return deepspeed_config(config, microbatches=4, ranks=2)


@pytest.mark.parametrize(
    ("first", "stage", "offloads"),
    [
        ({"zero_stage": 1, "offload_optimizer": "none"}, 3, set()),
        ({"zero_stage": 3, "offload_optimizer": "cpu", "offload_parameters": "cpu"}, 1, {"offload_optimizer"}),
        ({"zero_stage": 3, "offload_optimizer": "cpu", "offload_parameters": "cpu"}, 0, set()),
        ({"zero_stage": 2, "offload_optimizer": "cpu", "adam": "deepspeed"}, 0, set()),
    ],
)
def test_a_second_engine_has_its_stage_and_what_that_can_offload(first, stage, offloads):
    before = settings_of(**first)
    untouched = json.dumps(before)
    engine = at_stage(EngineConfig(**first), stage)
    found = second_engine(before, engine)
    assert json.dumps(before) == untouched
    assert zero_stage(found) == engine.zero_stage == stage
    assert {key for key in section(found, "zero_optimization") if key.startswith("offload")} == offloads


@pytest.mark.parametrize(("first", "second", "summed"), [(1, 0, False), (0, 1, True), (1, 3, True)])
def test_bf16_gradients_are_summed_in_fp32_where_the_stage_can(first, second, summed):
    engine = EngineConfig(zero_stage=first, offload_optimizer="none", precision="bf16")
    found = second_engine(settings_of(**dataclasses.asdict(engine)), at_stage(engine, second))
    assert (found.get("data_types") == {"grad_accum_dtype": "fp32"}) == summed


def test_monitors_and_profilers_stay_with_the_first():
    first = settings_of(zero_stage=1) | {"tensorboard": {"enabled": True}, "communication_data_type": "fp32"}
    found = second_engine(first, at_stage(EngineConfig(zero_stage=1), 3))
    assert "tensorboard" not in found and found["communication_data_type"] == "fp32"


def test_something_else_than_an_object_is_named():
    with pytest.raises(ValueError, match=r"zero_optimization\.offload_param is 'cpu'; it must be an object"):
        section({"zero_optimization": {"offload_param": "cpu"}}, "zero_optimization", "offload_param")


@pytest.mark.parametrize(
    ("zero", "most"),
    [
        ({}, LIVE),
        ({"stage3_max_live_parameters": 10**9, "stage3_max_reuse_distance": 10**9}, LIVE),
        ({"stage3_max_live_parameters": 7}, 7),
        ({"stage3_max_reuse_distance": 1e6}, 10**6),
        ({"stage3_max_live_parameters": "auto"}, LIVE),
        ({"offload_param": {"device": "cpu"}}, 0),
    ],
)
def test_weights_stay_gathered_as_far_as_the_user_allows(zero, most):
    assert most_kept({"zero_optimization": zero}) == most
