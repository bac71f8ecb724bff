"""Join the job, choose the task, train."""

from __future__ import annotations

from megatron_gemini.config.run import RunConfig
from megatron_gemini.engine.distributed import choose_device, join, leave
from megatron_gemini.parallel.topology import build_topology
from megatron_gemini.training.quiet import known_prints_dropped
from megatron_gemini.training.stop import StoppedError


def run(config: RunConfig) -> None:
    """Train as `config` says, on every rank that the launcher started. Raises `StoppedError` if it was stopped."""
    device = choose_device()
    with known_prints_dropped():
        join(device)
    topology = build_topology(config.parallel, "nccl" if device.type == "cuda" else "gloo")

    from megatron_gemini.training.loop import Loop, Task

    task: Task
    if config.train.task == "image_tokenizer":
        from megatron_gemini.objectives.image_tokenizer import ImageTokenizerTraining

        task = ImageTokenizerTraining(config, topology, device)
    else:
        from megatron_gemini.objectives.pretrain import Pretraining

        task = Pretraining(config, topology, device)
    number = Loop(task).run()
    leave()
    if number:
        raise StoppedError(number)
