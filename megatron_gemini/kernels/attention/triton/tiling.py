"""Block sizes of the attention kernels, and how many programs run them.

They come from a table and not from a search when a run begins: another block size rounds otherwise. A run that is
resumed, or that finds the card busy, has to give the same bits. `tools/bench/attention.py --tune` times others.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton

from megatron_gemini.kernels.triton_kernel import Kernel, on_device

MAX_SPLITS = 8  # groups of heads; each takes memory for its own gradients of keys and values, in float32


@dataclass(frozen=True)
class Tiling:
    """block_m: rows, a query head of a token each. block_n: keys. resident: programs that fit a multiprocessor."""

    block_m: int
    block_n: int
    warps: int
    stages: int
    resident: int = 1


@dataclass(frozen=True)
class Tilings:
    forward: Tiling
    query_gradient: Tiling
    key_gradient: Tiling


# By head width, rounded up to a power of two. All compile for their card; on Hopper none spills registers but the key
# gradient of 256 (96 bytes). Its two accumulators fill half the register file: with 16 warps a thread has at most 128
# registers and spills 352 bytes. Blocks of 32 keys spill nothing, but Hopper's matrix instruction takes 64 or more.
TILINGS = {
    "hopper": {
        64: Tilings(Tiling(128, 128, 8, 2), Tiling(128, 64, 8, 2), Tiling(64, 128, 8, 2)),
        128: Tilings(Tiling(128, 128, 8, 2), Tiling(128, 64, 8, 2), Tiling(32, 128, 8, 3)),
        256: Tilings(Tiling(128, 64, 8, 2), Tiling(128, 32, 8, 2), Tiling(32, 64, 8, 2)),
    },
    "ampere": {
        64: Tilings(Tiling(128, 64, 8, 2), Tiling(128, 64, 8, 2), Tiling(32, 64, 4, 2, 2)),
        128: Tilings(Tiling(64, 64, 4, 2, 2), Tiling(64, 64, 4, 2, 2), Tiling(32, 64, 4, 2, 2)),
        256: Tilings(Tiling(64, 64, 8, 2), Tiling(64, 32, 8, 2), Tiling(32, 32, 8, 2)),
    },
    "float32": {  # twice the memory, and three products for one
        64: Tilings(Tiling(32, 32, 4, 2), Tiling(32, 32, 4, 2), Tiling(32, 32, 4, 2)),
        128: Tilings(Tiling(64, 32, 4, 2), Tiling(32, 32, 4, 2), Tiling(32, 32, 4, 2)),
        256: Tilings(Tiling(32, 32, 4, 2), Tiling(32, 16, 4, 2), Tiling(16, 32, 4, 2)),
    },
}


def choose_tilings(q: torch.Tensor) -> Tilings:
    table = "float32" if q.dtype == torch.float32 else "hopper" if is_hopper(q.device) else "ampere"
    return TILINGS[table][max(64, padded_width(q.shape[2]))]


@lru_cache(maxsize=64)
def is_hopper(device: torch.device) -> bool:
    """Or newer. The interpreter counts as one."""
    return device.type == "cpu" or torch.cuda.get_device_capability(device) >= (9, 0)


def padded_width(head_width: int) -> int:
    """A block's columns: a power of two, and as many as a matrix product takes at least."""
    return max(16, triton.next_power_of_2(head_width))


def constants(tiling: Tiling, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> dict[str, int | str]:
    """What the three attention kernels are compiled for."""
    # Of float32, "tf32x3" is right to 1e-6. "ieee" on a card took two minutes to compile a small kernel, which spilled
    # 592 bytes a thread; the interpreter needs it, as it multiplies bfloat16 as the integers that it is stored as.
    precision = "ieee" if triton.knobs.runtime.interpret else "tf32x3" if q.dtype == torch.float32 else "tf32"
    kv_heads, width = k.shape[1:]
    return {
        "K": kv_heads,
        "G": q.shape[1] // kv_heads,
        "H": width,
        "WIDTH": padded_width(width),
        "BLOCK_M": tiling.block_m,
        "BLOCK_N": tiling.block_n,
        "PRECISION": precision,
        "TMA": takes_descriptors(q, k, v),
    }


def takes_descriptors(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether blocks come by the tensor memory accelerator, which wants everything at multiples of 16 bytes."""
    group = q.shape[1] // k.shape[1]
    if group & (group - 1) or not is_hopper(q.device):  # a descriptor's block has sides that are powers of two
        return False
    places = [place for x in (q, k, v) for place in (x.data_ptr(), *(s * x.element_size() for s in x.stride()[:2]))]
    return all(place % 16 == 0 for place in places) and q.shape[2] * q.element_size() % 16 == 0


def split_heads(programs: int, group: int, device: torch.device) -> int:
    """Into how many groups, a power of two, to split the heads of `programs` programs so that the chip is full."""
    splits = 1
    while splits < MAX_SPLITS and group % (2 * splits) == 0 and programs * splits < multiprocessors(device):
        splits *= 2
    return splits


@lru_cache(maxsize=64)
def multiprocessors(device: torch.device) -> int:
    # Few for the interpreter, so that in tests a program takes several tiles and heads are split.
    return 4 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


def launch(
    kernel: Kernel,
    tiling: Tiling,
    works: int,
    q: torch.Tensor,
    *arguments: torch.Tensor | int | float,
    **constant: int | str,
) -> None:
    """Run `works` tiles on as many programs as fit the chip at once; of n programs each takes every n-th tile."""
    if works == 0:
        return
    if constant["TMA"]:
        triton.set_allocator(_descriptor_memory)
    grid = (min(works, multiprocessors(q.device) * tiling.resident),)
    with on_device(q.device):
        kernel[grid](q, *arguments, **constant, num_warps=tiling.warps, num_stages=tiling.stages)


def _descriptor_memory(size: int, alignment: int, stream: int | None) -> torch.Tensor:
    """Triton keeps the descriptors that kernels make in memory that it asks for; torch's blocks are aligned enough."""
    return torch.empty(size, dtype=torch.int8, device="cuda")
