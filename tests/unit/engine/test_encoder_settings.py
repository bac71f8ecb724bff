"""DeepSpeed's dictionary for the encoders follows the decoder's where it can."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from megatron_gemini.config.encoders import EncoderEnginesConfig
from megatron_gemini.config.engine import EngineConfig
from megatron_gemini.config.run import RunConfig
from megatron_gemini.engine.deepspeed_config import deepspeed_config
from megatron_gemini.engine.encoder_engine import encoder_settings, engine_config


def run_config(own: int, **engine: object) -> RunConfig:
    return RunConfig(engine=EngineConfig(**engine), encoder_engines=EncoderEnginesConfig(zero_stage=own))


def test_a_users_json_holds_for_the_encoders_with_their_own_batch(tmp_path: Path) -> None:
    user = {
        "train_batch_size": 8,
        "gradient_accumulation_steps": 4,
        "zero_optimization": {"overlap_comm": True, "reduce_bucket_size": 50, "stage3_prefetch_bucket_size": 5000},
        "tensorboard": {"enabled": True},
        "flops_profiler": {"enabled": True},
        "communication_data_type": "fp32",
    }
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(user))
    config = run_config(-1, deepspeed_config=str(path))
    decoder = deepspeed_config(config, microbatches=4, ranks=2)
    before = json.dumps(decoder)
    found = encoder_settings(decoder, config, world=6, parameters=1000)
    assert json.dumps(decoder) == before
    assert (found["train_batch_size"], found["gradient_accumulation_steps"]) == (6, 1)
    assert "tensorboard" not in found and "flops_profiler" not in found
    assert found["communication_data_type"] == "fp32"
    zero = found["zero_optimization"]
    assert zero["overlap_comm"] and zero["stage"] == 3 and zero["offload_optimizer"] == {"device": "cpu"}
    assert (zero["reduce_bucket_size"], zero["stage3_prefetch_bucket_size"]) == (50, 1000)


@pytest.mark.parametrize(
    ("own", "engine", "stage", "offloaded"),
    [
        (-1, {"zero_stage": 1}, 1, {"offload_optimizer"}),
        (-1, {"zero_stage": 3, "offload_parameters": "cpu"}, 3, {"offload_optimizer", "offload_param"}),
        (1, {"zero_stage": 3, "offload_parameters": "cpu"}, 1, {"offload_optimizer"}),
        (0, {"zero_stage": 3}, 0, set()),
        (3, {"zero_stage": 0, "offload_optimizer": "none"}, 3, set()),
        (0, {"zero_stage": 3, "adam": "deepspeed"}, 0, set()),
    ],
)
def test_a_stage_of_their_own_leaves_out_what_it_cannot_offload(own, engine, stage, offloaded):
    config = run_config(own, **engine)
    zero = encoder_settings(deepspeed_config(config, 4, 2), config, 2, 100)["zero_optimization"]
    assert zero["stage"] == stage == engine_config(config).engine.zero_stage
    assert {key for key in zero if key.startswith("offload")} == offloaded


@pytest.mark.parametrize(("own", "decoder", "summed"), [(-1, 1, True), (0, 1, False), (1, 0, True)])
def test_bf16_gradients_are_summed_in_fp32_where_the_stage_can(own, decoder, summed):
    config = run_config(own, zero_stage=decoder, offload_optimizer="none", precision="bf16")
    found = encoder_settings(deepspeed_config(config, 4, 2), config, 2, 100)
    assert found["bf16"]["enabled"]
    assert (found.get("data_types") == {"grad_accum_dtype": "fp32"}) == summed


def test_the_configuration_keeps_everything_else():
    config = run_config(1, zero_stage=3)
    assert dataclasses.replace(engine_config(config), engine=config.engine) == config
