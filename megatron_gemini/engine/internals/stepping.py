"""A step of DeepSpeed's optimizer: gradients that have arrived, the norm to clip by, a step that is dropped."""

from __future__ import annotations

from typing import Any

import torch


def wait_for_gradients(engine: Any) -> None:
    """Block until DeepSpeed's asynchronous reductions and copies to the host have finished."""
    if hasattr(engine.optimizer, "_wait_for_offload_copies"):
        engine.optimizer._wait_for_offload_copies()
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def keep_accumulating(engine: Any) -> None:
    """After a backward: the next one adds to its gradients, also if no forward comes between.

    DeepSpeed counts backwards at the forward that follows; where several forwards come first and then as many
    backwards, as in a pipeline, each backward would otherwise overwrite the gradients of the one before.
    """
    if hasattr(engine.optimizer, "clear_backward_seen_flag"):  # ZeRO-0 has nothing to count
        engine.optimizer.clear_backward_seen_flag()


def clips_itself(engine: Any) -> bool:
    """Whether DeepSpeed's wrapper has a seam through which it can be told the norm to clip by."""
    return hasattr(engine.optimizer, "_get_norm_groups") or hasattr(engine.optimizer, "scaled_global_norm")


def silence_own_clipping(engine: Any) -> None:
    """Where there is no such seam (ZeRO-0, and ZeRO-1 in bf16), stop DeepSpeed from clipping by its own norm."""
    if not clips_itself(engine):
        engine.clip_fp32_gradients = lambda: None
        if hasattr(engine.optimizer, "clip_grad"):
            engine.optimizer.clip_grad = 0.0


def replace_norm(engine: Any, norm: torch.Tensor) -> None:
    """Let the next `engine.step()` clip by `norm` in place of DeepSpeed's own figure; it must be finite."""
    optimizer = engine.optimizer
    if hasattr(optimizer, "_get_norm_groups"):  # ZeRO-3
        optimizer._get_norm_groups = lambda: [norm]
    elif hasattr(optimizer, "scaled_global_norm"):  # ZeRO-1 and 2
        optimizer.scaled_global_norm = lambda norm_type=2: norm


def skip_step(engine: Any) -> None:
    """Drop the gradients of this step, by DeepSpeed's own overflow path where it has one."""
    optimizer = engine.optimizer
    if clips_itself(engine):
        replace_norm(engine, torch.tensor(-1.0, device=engine.device))  # its sign of a non-finite norm
        engine.step()
        _forget_offloaded_gradients(optimizer)
        return
    for name in ("clear_hp_grads", "clear_lp_grads"):
        if hasattr(optimizer, name):
            getattr(optimizer, name)()
    engine.zero_grad()


def _forget_offloaded_gradients(optimizer: Any) -> None:
    """After a skipped step DeepSpeed 0.19 keeps what ZeRO-1 and 2 offloaded, and a NaN would return for ever."""
    if not getattr(optimizer, "cpu_offload", False):
        return
    for key in optimizer.averaged_gradients:
        optimizer.averaged_gradients[key] = None
    for master in optimizer.single_partition_of_fp32_groups:
        master.grad.zero_()
    for gradient in optimizer.accumulated_grads_in_cpu.values():
        gradient.zero_()
    optimizer.zero_grad(set_to_none=True)
