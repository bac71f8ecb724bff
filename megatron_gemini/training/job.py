"""Joining the job that a launcher has started, and leaving it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch

from megatron_gemini.config.run import RunConfig
from megatron_gemini.engine.builds import builds_watched
from megatron_gemini.engine.distributed import choose_device, join, leave
from megatron_gemini.parallel.topology import Topology, build_topology


@contextlib.contextmanager
def join_job(config: RunConfig) -> Iterator[tuple[Topology, torch.device]]:
    """This rank's place among those that the launcher started, and its device. Left at the end, if all went well."""
    # Before anything imports DeepSpeed, which chooses its accelerator then, by what is installed.
    device = choose_device()
    with builds_watched(int(os.environ.get("RANK", "0"))):
        join(device)
    yield build_topology(config.parallel, "nccl" if device.type == "cuda" else "gloo"), device
    leave()  # not after an error: a rank that leaves alone would wait for the others
