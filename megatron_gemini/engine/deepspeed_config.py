"""DeepSpeed's JSON, made from the run's configuration and checked against the user's own.

A value that both determine must agree or is an error that names both; "auto" is filled in; whatever the run's
configuration does not decide (buckets, pinning, profilers, monitors) passes through untouched.
"""

from __future__ import annotations

import json
from pathlib import Path

from megatron_gemini.config.run import RunConfig
from megatron_gemini.engine.settings import Json, JsonObject, section

# Decided elsewhere, so a user's JSON must not switch them on.
REFUSED = {
    "fp16": "engine.precision decides; the trainer runs in fp32 or bf16",
    "scheduler": "the schedule section decides the learning rate",
    "amp": "engine.precision decides",
    "pipeline": "parallel decides the layout",
    "tensor_parallel": "parallel.tensor decides",
}


def deepspeed_config(config: RunConfig, microbatches: int, ranks: int) -> JsonObject:
    """The dictionary for `deepspeed.initialize`.

    microbatches: of one rank and global step; ranks: those over which ZeRO divides and averages.
    Raises `ValueError` where the JSON of `engine.deepspeed_config` contradicts the run's configuration.
    """
    decided = decided_values(config, microbatches, ranks)
    merged: JsonObject = {}
    if config.engine.deepspeed_config:
        merged = read_json(config.engine.deepspeed_config)
    refuse(merged, config.engine.deepspeed_config)
    check_optimizer(merged.pop("optimizer", None), config)
    agree(merged, decided, config.engine.deepspeed_config)
    merge(merged, decided)
    leave_to_deepspeed(merged)
    if config.engine.zero_stage == 3:
        # By default DeepSpeed keeps parameters of up to 100,000 elements whole on every rank.
        section(merged, "zero_optimization").setdefault("stage3_param_persistence_threshold", 0)
    merged.setdefault("steps_per_print", 10**9)  # the trainer prints its own progress
    # Else DeepSpeed refuses torch's AdamW for an optimizer that is offloaded; `engine.adam` decides.
    merged.setdefault("zero_force_ds_cpu_optimizer", False)
    merged.setdefault("zero_allow_untested_optimizer", True)
    return merged


def decided_values(config: RunConfig, microbatches: int, ranks: int) -> JsonObject:
    """What the run's configuration determines, in DeepSpeed's vocabulary."""
    engine = config.engine
    zero: JsonObject = {"stage": engine.zero_stage}
    for key, device in (("offload_optimizer", engine.offload_optimizer), ("offload_param", engine.offload_parameters)):
        if device != "none":
            zero[key] = {"device": device} | ({"nvme_path": engine.nvme_path} if device == "nvme" else {})
    decided: JsonObject = {
        "train_micro_batch_size_per_gpu": 1,  # a packed row, or a rank's images
        "gradient_accumulation_steps": microbatches,
        # DeepSpeed asserts that it is the product of the two above and its data-parallel ranks.
        "train_batch_size": microbatches * ranks,
        "gradient_clipping": engine.gradient_clipping,
        "zero_optimization": zero,
    }
    if engine.precision == "bf16":
        # Gradients of several microbatches are summed in fp32; a non-finite norm skips the step.
        decided["bf16"] = {"enabled": True, "check_grad_overflow": True}
        # Not for ZeRO-0, which adds up its gradients in the weights' own precision.
        if engine.zero_stage:
            decided["data_types"] = {"grad_accum_dtype": "fp32"}
    else:
        decided["bf16"] = {"enabled": False}
    return decided


def read_json(path: str) -> JsonObject:
    """A JSON object from a file, or a `ValueError` that names the file."""
    try:
        value = json.loads(Path(path).read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"engine.deepspeed_config {path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"engine.deepspeed_config {path} holds a {type(value).__name__}; it must be a JSON object")
    return value


def refuse(user: JsonObject, path: str) -> None:
    """Raise on a section that something else decides, unless it is off."""
    for key, reason in REFUSED.items():
        value = user.get(key)
        if value and not (isinstance(value, dict) and value.get("enabled") in (False, "auto")):
            raise ValueError(f"{path} sets {key}; remove it: {reason}")


def check_optimizer(user: Json, config: RunConfig) -> None:
    """Raise where the JSON's optimizer section contradicts the run's; the trainer makes the optimizer itself."""
    if user is None:
        return
    path, chosen = config.engine.deepspeed_config, config.optimizer
    if not isinstance(user, dict):
        raise ValueError(f"{path} sets optimizer to {user!r}; it must be an object")
    if str(user.get("type", "auto")).lower() not in ("adamw", "auto"):
        raise ValueError(f"{path} sets optimizer.type {user['type']!r}; the trainer's optimizer is AdamW")
    ours: JsonObject = {
        "lr": chosen.lr,
        "betas": [chosen.beta1, chosen.beta2],
        "eps": chosen.eps,
        "weight_decay": chosen.weight_decay,
    }
    params = _below(user, "params", f"{path} sets optimizer.")
    agree({k: v for k, v in params.items() if k in ours}, ours, f"{path} (optimizer.params)")
    unknown = sorted(set(params) - set(ours) - {"torch_adam", "adam_w_mode"})
    if unknown:
        raise ValueError(f"{path} sets optimizer.params.{unknown[0]}, which the trainer does not pass on; remove it")


def agree(user: JsonObject, decided: JsonObject, path: str, prefix: str = "") -> None:
    """Raise where a value of the user's JSON is neither "auto" nor what the run's configuration says."""
    for key, ours in decided.items():
        if key not in user or user[key] == "auto":
            continue
        theirs = user[key]
        if isinstance(ours, dict):
            if not isinstance(theirs, dict):
                raise ValueError(f"{path} sets {prefix}{key} to {theirs!r}; it must be an object")
            agree(theirs, ours, path, f"{prefix}{key}.")
        elif theirs != ours:
            raise ValueError(
                f"{path} sets {prefix}{key} to {theirs!r}, the run's configuration gives {ours!r}; "
                'make them equal or write "auto"'
            )
    if prefix == "zero_optimization.":
        # What the run does not offload is not among the decided values, so the loop above has passed it over.
        for key in ("offload_optimizer", "offload_param"):
            device = _below(user, key, f"{path} sets {prefix}").get("device", "none")
            if device not in ("none", "auto") and key not in decided:
                raise ValueError(
                    f"{path} sets {prefix}{key}.device to {device!r}, the run's configuration none; "
                    f"set engine.{key.replace('offload_param', 'offload_parameters')} or remove it"
                )


def _below(user: JsonObject, key: str, sets: str) -> JsonObject:
    """The object that the user's JSON has at `key`, empty where there is none or it is left to us."""
    value = user.get(key, "auto")
    if value == "auto":
        return {}
    if not isinstance(value, dict):
        raise ValueError(f"{sets}{key} to {value!r}; it must be an object")
    return value


def merge(user: JsonObject, decided: JsonObject) -> None:
    """Write the decided values into the user's dictionary, section by section."""
    for key, value in decided.items():
        if isinstance(value, dict) and isinstance(below := user.get(key), dict):
            merge(below, value)
        else:
            user[key] = value


def leave_to_deepspeed(settings: JsonObject) -> None:
    """Drop what is still "auto": DeepSpeed's own default holds. An offload to "auto" that nobody asked for is none."""
    for key, value in list(settings.items()):
        if value == "auto" or (isinstance(value, dict) and value.get("device") == "auto"):
            del settings[key]
        elif isinstance(value, dict):
            leave_to_deepspeed(value)
            if not value and key in REFUSED:
                del settings[key]
