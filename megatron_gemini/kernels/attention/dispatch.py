"""Which implementation of attention runs: the first of the list that can do what is asked.

Shape suffixes: T packed tokens, Q queries (T, or this rank's), N query heads, K key/value heads, H head width.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple, Protocol, TypeAlias

import torch

from megatron_gemini.kernels.attention.cpu.node import attend_on_cpu
from megatron_gemini.kernels.attention.flash import attend_by_flash_attention, installed_flash_attention
from megatron_gemini.kernels.attention.plan import AttentionPlan
from megatron_gemini.kernels.attention.sdpa import attend_by_sdpa
from megatron_gemini.kernels.rope import CosSin

HALF = (torch.float16, torch.bfloat16)
TRITON_WIDTHS = (64, 80, 96, 128, 256)  # what the block sizes are made for; the interpreter takes any
SHARED_MEMORY = 163 * 1024  # bytes of a multiprocessor that a program can have: an A100's

# q_QNH, k_TKH, v_TKH, plan, scale, cos_sin -> out_QNH, and lse_QN or None if it was not asked for
Inputs: TypeAlias = tuple[torch.Tensor, torch.Tensor, torch.Tensor, AttentionPlan, float | None, CosSin | None]
Result: TypeAlias = tuple[torch.Tensor, torch.Tensor | None]


class Attend(Protocol):
    """An implementation: see `api.attention_with_lse`. Some query sees a key."""

    def __call__(self, *inputs: *Inputs, with_lse: bool) -> Result: ...


class AttentionRequest(NamedTuple):
    """What is asked of a backend.

    sequences: the row is documents that are all causal or all seen whole, and every query is here.
    cross: the keys are not the row's.
    """

    device: torch.device
    dtype: torch.dtype
    head_width: int
    sequences: bool
    with_lse: bool
    cross: bool = False


class AttentionBackend(NamedTuple):
    """unable: why it cannot do what is asked, or ""."""

    name: str
    why: str
    unable: Callable[[AttentionRequest], str]
    attend: Attend


def _triton_unable(request: AttentionRequest) -> str:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if request.dtype not in (*HALF, torch.float32):
        return f"it takes float16, bfloat16 and float32, not {request.dtype}"
    if request.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return ""
    if request.device.type != "cuda":
        return f"it is for CUDA, not {request.device.type}; TRITON_INTERPRET=1 runs it on the CPU, slowly, for tests"
    if request.head_width not in TRITON_WIDTHS:  # others would compile, with block sizes that nobody has tried
        return f"it takes heads of {', '.join(map(str, TRITON_WIDTHS))}, not {request.head_width}"
    return card_runs_triton(request.device)


@lru_cache(maxsize=64)
def card_runs_triton(device: torch.device) -> str:
    """ "", or why our blocks do not fit the card: A100 and H100 are what they are made for."""
    card = torch.cuda.get_device_properties(device)
    if (card.major, card.minor) < (8, 0):
        return f"{card.name} is older than Ampere"
    # Cards of one generation differ: a workstation's Ampere (8.6) has 99 KiB where an A100 (8.0) has 163.
    memory: int = card.shared_memory_per_block_optin  # type: ignore[attr-defined]  # missing in torch's stubs
    if memory < SHARED_MEMORY:
        return f"{card.name} has {memory} bytes of shared memory a program, not {SHARED_MEMORY}"
    return ""


def _flash_unable(request: AttentionRequest) -> str:
    if request.device.type != "cuda":
        return f"it is for CUDA, not {request.device.type}"
    if installed_flash_attention() is None:
        return "flash-attn is not installed"
    if request.dtype not in HALF:
        return f"it takes float16 and bfloat16, not {request.dtype}"
    if request.cross:
        return "it is called for rows that attend to themselves, and the keys are not the row's"
    if not request.sequences:
        return "the row mixes causal tokens and spans, or only some of its queries are here"
    if request.with_lse:  # the package returns it, but its backward takes no gradient of it
        return "its log-sum-exp has no gradient"
    return "" if request.head_width <= 256 else f"it takes heads of at most 256, not {request.head_width}"


def _newest_flash_unable(request: AttentionRequest) -> str:
    found = installed_flash_attention()
    if found is not None and found[0] == 2:
        return "only version 2 is installed, which does not share keys between heads"
    return _flash_unable(request)


def _flex_unable(request: AttentionRequest) -> str:
    if request.device.type == "cpu":
        return "it has no backward on the CPU" if torch.is_grad_enabled() else ""
    if request.device.type != "cuda":
        return f"it is compiled for CUDA, not {request.device.type}"
    return "" if importlib.util.find_spec("triton") else "it is compiled by triton, which is not installed"


def _by_triton(*inputs: *Inputs, with_lse: bool) -> Result:
    from megatron_gemini.kernels.attention.triton.operators import attend_by_triton  # where triton may not be installed

    return attend_by_triton(*inputs)


def _by_flex(*inputs: *Inputs, with_lse: bool) -> Result:
    from megatron_gemini.kernels.attention.flex import attend_by_flex  # takes a second to import

    return attend_by_flex(*inputs)


# docs/performance.md, "Attention on CPU", decided for the first. The order on CUDA is not measured: flash-attn 3 and 4
# are known to be faster than what Triton reaches on plain causal rows, and only our kernel shares keys between heads.
BACKENDS = (
    AttentionBackend(
        "cpu",
        "torch's CPU flash attention, document by document, as one autograd node",
        lambda request: "" if request.device.type == "cpu" else "it is for tensors on the CPU",
        attend_on_cpu,
    ),
    AttentionBackend(
        "flash-attn", "flash-attn 3 or 4 for rows of causal documents", _newest_flash_unable, attend_by_flash_attention
    ),
    AttentionBackend("triton", "the heads that share keys read them once", _triton_unable, _by_triton),
    AttentionBackend(
        "flash-attn-2", "flash-attn 2 for rows of causal documents", _flash_unable, attend_by_flash_attention
    ),
    AttentionBackend("flex", "torch's FlexAttention, compiled", _flex_unable, _by_flex),
    AttentionBackend(
        "sdpa",
        "torch SDPA, documents of similar length in one call",
        lambda request: "torch's public call returns no log-sum-exp" if request.with_lse else "",
        attend_by_sdpa,
    ),
)


def choose_backend(request: AttentionRequest, name: str | None = None) -> AttentionBackend:
    """The first able backend, or the one of this name. Raises ValueError if there is none or it is not able."""
    reasons = []
    for backend in BACKENDS:
        if name in (None, backend.name):
            reason = backend.unable(request)
            if not reason:
                return backend
            reasons.append(f"{backend.name}: {reason}")
    if not reasons:
        raise ValueError(f"attention backend is {name!r}; there are {', '.join(b.name for b in BACKENDS)}")
    raise ValueError(f"no attention backend for this call; {'; '.join(reasons)}")
