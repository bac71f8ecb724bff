"""The release of DeepSpeed that this folder was checked with, and what to say of another that lacks something."""

from __future__ import annotations

from typing import Any

CHECKED = "0.19"
_RELIED_ON = {
    1: ("get_param_id", "averaged_gradients", "update_lp_params", "clear_backward_seen_flag"),
    2: ("get_param_id", "averaged_gradients", "update_lp_params", "clear_backward_seen_flag"),
    3: (
        "get_param_id",
        "grad_position",
        "fp32_partitioned_groups_flat",
        "_get_param_partition_rank",
        "_get_fp32_grad_state_partition",
        "_get_norm_groups",
        "_swappable_optimizer_subgroup",
        "clear_backward_seen_flag",
    ),
}


def check(engine: Any) -> None:
    """Raise RuntimeError that names what this release of DeepSpeed no longer has of what is used here."""
    if type(engine.optimizer).__name__ == "BF16_Optimizer":  # which takes the place of ZeRO-1's in bf16
        return
    for name in _RELIED_ON.get(engine.zero_optimization_stage(), ()):
        if not hasattr(engine.optimizer, name):
            raise changed(f"{type(engine.optimizer).__name__}.{name}")


def changed(name: str) -> RuntimeError:
    """An error that says which internal of DeepSpeed this release no longer has."""
    import deepspeed

    return RuntimeError(
        f"deepspeed {deepspeed.__version__} has no {name}, on which this trainer relies; checked with {CHECKED}. "
        "Install that version (constraints.txt)"
    )
