"""Joining and leaving the job's process group, under the deepspeed launcher, torchrun, srun or none of them."""

from __future__ import annotations

import atexit
import os
import socket
import sys
from typing import NoReturn

import torch
import torch.distributed as dist

from megatron_gemini.engine.build_locks import remove_stale_locks
from megatron_gemini.engine.builds import use_own_build_folder
from megatron_gemini.engine.internals.unused import no_shared_memory


def choose_device() -> torch.device:
    """This rank's device: its GPU where CUDA is there, else the CPU."""
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        return device
    # DeepSpeed chooses its accelerator when it is imported, by what is installed.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    return torch.device("cpu")


def join(device: torch.device) -> None:
    """Join the world that the launcher describes; a process without a launcher becomes a world of one."""
    import deepspeed

    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    for key, value in alone.items():
        os.environ.setdefault(key, value)
    # Any free port, so that two runs without a launcher do not meet on one machine.
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        os.environ.setdefault("MASTER_PORT", str(probe.getsockname()[1]))
    if dist.is_initialized():
        return
    use_own_build_folder()
    remove_stale_locks()
    if device.type == "cpu":
        no_shared_memory()
    deepspeed.init_distributed("nccl" if device.type == "cuda" else "gloo", auto_mpi_discovery=False, verbose=False)


def job_store() -> dist.Store:
    """What the ranks met by, which outlasts their collectives: keys and values for small messages."""
    return dist.distributed_c10d._get_default_store()


def store_in_a_rank() -> bool:
    """Whether rank 0 has the store in its own process, as it does unless torchrun has it."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"


def leave() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def end_process(status: int = 0) -> NoReturn:
    """End this process without the interpreter's teardown, after what `atexit` was given to do.

    Gloo's threads give tensors back some time after their collective. One that needs the interpreter for it while that
    is being torn down aborts the process (pytorch/pytorch#190489), and a run that ended well looks like one that died.
    """
    atexit._run_exitfuncs()  # `os._exit` would leave them out, and what is in the streams' buffers
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status)
