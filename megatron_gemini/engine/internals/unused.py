"""What DeepSpeed brings along that nothing here uses, and that costs a CPU time."""

from __future__ import annotations


def no_ranges() -> None:
    """Leave out its marks for a profiler of GPUs, which wrap every hook of every module.

    Of a quickstart's step under ZeRO-3 they took 4%.
    """
    from deepspeed.utils import nvtx

    nvtx.enable_nvtx = False


def no_shared_memory() -> None:
    """Leave out its all-reduce over shared memory, before `deepspeed.init_distributed`: it is for inference alone.

    To compile it takes half a minute in every new environment. At every start it took 66 MiB a rank of /dev/shm, which
    stayed there. It is looked up in the list of operators that can be compiled.
    """
    from deepspeed import ops

    vars(ops).setdefault("__compatible_ops__", {})
