"""Join the job, build the objective, train."""

from __future__ import annotations

from megatron_gemini.config.run import RunConfig
from megatron_gemini.engine.distributed import choose_device, join, leave
from megatron_gemini.parallel.topology import build_topology
from megatron_gemini.registry import OBJECTIVES
from megatron_gemini.training.quiet import known_prints_dropped
from megatron_gemini.training.stop import StoppedError


def run(config: RunConfig) -> None:
    """Train as `config` says, on every rank that the launcher started. Raises `StoppedError` if it was stopped."""
    device = choose_device()
    with known_prints_dropped():
        join(device)
    topology = build_topology(config.parallel, "nccl" if device.type == "cuda" else "gloo")

    from megatron_gemini.training.loop import Loop  # DeepSpeed has been imported quietly by now

    objective = OBJECTIVES.get(config.objective.kind).build(config, topology, device)
    number = Loop(objective).run()
    leave()
    if number:
        raise StoppedError(number)
