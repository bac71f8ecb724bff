"""DeepSpeed's JSON is made from the run's configuration, and a user's own must agree with it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from megatron_gemini.config.run import RunConfig
from megatron_gemini.engine.deepspeed_config import deepspeed_config


def merged(tmp_path: Path, user: dict, **engine: object) -> dict:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(user))
    section = dataclasses.replace(RunConfig().engine, deepspeed_config=str(path), **engine)
    return deepspeed_config(dataclasses.replace(RunConfig(), engine=section), microbatches=4, ranks=2)


def values(tree: object) -> list[object]:
    return [leaf for child in tree.values() for leaf in values(child)] if isinstance(tree, dict) else [tree]


def test_auto_is_filled_in_where_we_decide_and_left_to_deepspeed_elsewhere(tmp_path: Path) -> None:
    user = {
        "train_batch_size": "auto",
        "gradient_clipping": "auto",
        "fp16": {"enabled": "auto"},
        "bf16": {"enabled": "auto"},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto"}},
        "zero_optimization": {"stage": "auto", "reduce_bucket_size": "auto", "stage3_max_live_parameters": 10},
    }
    found = merged(tmp_path, user)
    assert found["train_batch_size"] == 8 and found["gradient_accumulation_steps"] == 4
    assert found["zero_optimization"]["stage"] == 3 and found["zero_optimization"]["stage3_max_live_parameters"] == 10
    assert "auto" not in values(found)


def test_an_offload_left_to_us_is_off_where_we_do_not_offload(tmp_path: Path) -> None:
    user = {"zero_optimization": {"offload_optimizer": {"device": "auto", "pin_memory": True}}}
    assert "offload_optimizer" not in merged(tmp_path, user, offload_optimizer="none")["zero_optimization"]
    kept = merged(tmp_path, user)["zero_optimization"]["offload_optimizer"]
    assert kept == {"device": "cpu", "pin_memory": True}


@pytest.mark.parametrize(
    ("user", "named"),
    [
        ({"gradient_clipping": 0.5}, "gradient_clipping to 0.5"),
        ({"zero_optimization": {"stage": 1}}, "zero_optimization.stage to 1"),
        ({"zero_optimization": {"offload_param": {"device": "nvme"}}}, "offload_param.device to 'nvme'"),
        ({"optimizer": {"type": "Lamb"}}, "optimizer.type 'Lamb'"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1.0}}}, "lr to 1.0"),
        ({"fp16": {"enabled": True}}, "sets fp16"),
        ({"scheduler": {"type": "WarmupLR"}}, "sets scheduler"),
        ({"zero_optimization": 3}, "zero_optimization to 3; it must be an object"),
        ({"zero_optimization": {"offload_param": "cpu"}}, "offload_param to 'cpu'; it must be an object"),
        ({"optimizer": "AdamW"}, "optimizer to 'AdamW'; it must be an object"),
        ({"optimizer": {"type": "AdamW", "params": [1]}}, r"optimizer.params to \[1\]; it must be an object"),
    ],
)
def test_a_contradiction_is_named(tmp_path: Path, user: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        merged(tmp_path, user)


@pytest.mark.parametrize("value", ["auto", {"device": "auto"}])
def test_an_offload_that_is_left_to_us_contradicts_nothing(tmp_path: Path, value: object) -> None:
    found = merged(tmp_path, {"zero_optimization": {"offload_param": value}}, offload_parameters="none")
    assert "offload_param" not in found["zero_optimization"]
