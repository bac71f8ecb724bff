"""A chosen plan as files that training takes: the run's YAML, and beside it DeepSpeed's JSON."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import cast

from megatron_gemini.config.load import dump_config
from megatron_gemini.config.schema import Plain
from megatron_gemini.engine.deepspeed_config import decided_values, merge, read_json
from megatron_gemini.engine.settings import LIVE
from megatron_gemini.planning.search import LayoutPlan
from megatron_gemini.planning.zero_state import BUCKET

# DeepSpeed multiplies them out: with all three written, another number of rows would be a contradiction.
_BATCH = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


def write_plan(plan: LayoutPlan, path: Path) -> tuple[Path, Path]:
    """Write `path` (YAML, for `train --config`) and the JSON beside it that its engine.deepspeed_config names.

    Raises a `ValueError` for a path that does not end in .yaml or .yml, or whose folder does not exist.
    """
    check_path(path)
    beside = path.with_suffix(".json")
    settings = deepspeed_settings(plan)
    engine = dataclasses.replace(plan.job.config.engine, deepspeed_config=str(beside))
    beside.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    path.write_text(dump_config(dataclasses.replace(plan.job.config, engine=engine)), encoding="utf-8")
    return path, beside


def check_path(path: Path) -> None:
    """Raise the `ValueError` that `write_plan` would, before any work is done."""
    if path.suffix not in (".yaml", ".yml"):
        raise ValueError(f"--out is {str(path)!r}; name a .yaml file, beside which the .json of DeepSpeed is written")
    if not path.parent.is_dir():
        raise ValueError(f"--out {path}: the folder {path.parent} does not exist")


def deepspeed_settings(plan: LayoutPlan) -> dict[str, Plain]:
    """The plan in DeepSpeed's vocabulary, with the bucket sizes that its bytes assume.

    What a JSON of the user's own sets beside that is kept. The batch sizes are "auto", so that the rows of a step may
    still be changed on the command line.
    """
    config = plan.job.config
    settings: dict[str, Plain] = read_json(config.engine.deepspeed_config) if config.engine.deepspeed_config else {}
    zero = cast("dict[str, Plain]", settings.setdefault("zero_optimization", {}))
    for key in ("offload_optimizer", "offload_param"):
        zero.pop(key, None)  # the plan decides, and a device of the user's own would contradict it
    merge(settings, decided_values(config, plan.job.microbatches, plan.job.zero.ranks))
    settings |= dict.fromkeys(_BATCH, "auto")
    for key in ("offload_optimizer", "offload_param"):
        if key in zero:
            # Copies from pageable memory wait for the host, and those of every step would.
            cast("dict[str, Plain]", zero[key])["pin_memory"] = True
    if config.engine.zero_stage > 0:
        zero |= {"reduce_bucket_size": BUCKET, "allgather_bucket_size": BUCKET}
    if config.engine.zero_stage == 3:
        zero |= {"stage3_prefetch_bucket_size": BUCKET}
        zero |= dict.fromkeys(("stage3_max_live_parameters", "stage3_max_reuse_distance"), LIVE)
    return settings
