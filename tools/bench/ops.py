"""Whether the operations around the matrix products need kernels of their own: eager torch, ours, and torch.compile.

    python tools/bench/ops.py                        # on a CPU: T=256, D=256, float32
    python tools/bench/ops.py                        # on a GPU: T=8,192, D=2,048, bfloat16; about two minutes
    python tools/bench/ops.py --tokens 1024 --width 512 --rounds 30

RMSNorm, a residual sum and RMSNorm, RoPE of queries and keys, the gated MLP with its norm, and encoder embeddings put
in their places; forward and backward of each. One JSON line an operation: times as ratios to eager torch, interleaved
in one process (CPU time of one thread, or the GPU's time), and the share of the device's memory bandwidth that ours
reaches when only the operation's own inputs, outputs and gradients are counted. "kernel wanted" says that compiled code
is more than 10% faster than ours, so that a kernel could gain that much.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from megatron_gemini.kernels.norm import rms_norm
from megatron_gemini.kernels.rope import CosSin, apply_rope_to_both, rope_cos_sin
from megatron_gemini.models.placement import Embeddings, place
from megatron_gemini.parallel.collectives import TensorRanks
from megatron_gemini.parallel.tensor.products import gated_mlp

EPS = 1e-6
Operation = Callable[..., torch.Tensor | tuple[torch.Tensor, ...]]


class Case(NamedTuple):
    """eager: as one would write it in torch; also compiled. ours: this package's. inputs: all want a gradient."""

    eager: Operation
    ours: Operation
    inputs: list[torch.Tensor]


def plain_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    wide = x.float()
    inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)
    return (wide * inverse * (1 + weight.float())).to(x.dtype)


def plain_rope(q: torch.Tensor, k: torch.Tensor, cos_sin: CosSin) -> tuple[torch.Tensor, ...]:
    def rotated(x: torch.Tensor) -> torch.Tensor:
        low, high = x.chunk(2, -1)
        return x * cos_sin.cos_T1H + torch.cat((high, low), -1) * cos_sin.sin_T1H

    return rotated(q), rotated(k)


def plain_mlp(h: torch.Tensor, norm: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    gate, up = F.linear(plain_norm(h, norm), gate_up.flatten(0, 1)).chunk(2, -1)
    return h + F.linear(F.gelu(gate, approximate="tanh") * up, down)


def cases(tokens: int, width: int, device: torch.device, dtype: torch.dtype) -> dict[str, Case]:
    def draw(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(shape, device=device, dtype=dtype) * scale).requires_grad_()

    heads, head_width = 8, width // 8
    cos_sin = rope_cos_sin(torch.arange(tokens, device=device), head_width, 10_000.0, dtype)
    position_O = torch.randperm(tokens, device=device)[: tokens // 4].sort().values
    is_media_T1 = torch.zeros(tokens, 1, dtype=torch.bool, device=device).index_fill_(0, position_O, True)

    def scatter(h: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
        return h.masked_scatter(is_media_T1, e)

    stream, norm = draw(tokens, width), draw(width, scale=0.1)
    inner = draw(2, 4 * width, width, scale=width**-0.5), draw(width, 4 * width, scale=(4 * width) ** -0.5)
    alone = TensorRanks()
    return {
        "RMSNorm": Case(plain_norm, lambda x, w: rms_norm(x, w, EPS), [stream, norm]),
        "sum and RMSNorm": Case(
            lambda x, y, w: plain_norm(x + y, w),
            lambda x, y, w: rms_norm(x + y, w, EPS),
            [stream, draw(tokens, width), norm],
        ),
        "RoPE": Case(
            lambda q, k: plain_rope(q, k, cos_sin),
            lambda q, k: apply_rope_to_both(q, k, cos_sin),
            [draw(tokens, heads, head_width), draw(tokens, 1, head_width)],
        ),
        "gated MLP": Case(
            plain_mlp, lambda h, n, g, d: gated_mlp(h, n, EPS, g, d, "gelu", alone), [stream, norm, *inner]
        ),
        "placement": Case(
            scatter, lambda h, e: place(h, Embeddings(position_O, e)), [stream, draw(len(position_O), width)]
        ),
    }


def steps(case: Case) -> tuple[dict[str, Callable[[], None]], int]:
    """Forward and backward of each contender, and the bytes of inputs, outputs and their gradients."""
    out = case.eager(*case.inputs)
    outs = out if isinstance(out, tuple) else (out,)
    grads = [torch.randn_like(x) for x in outs]

    def step(operation: Operation) -> Callable[[], None]:
        def run() -> None:
            found = operation(*case.inputs)
            torch.autograd.grad(found if isinstance(found, tuple) else (found,), case.inputs, grads)

        return run

    compiled = torch.compile(case.eager, dynamic=False)
    size = sum(2 * x.numel() * x.itemsize for x in (*case.inputs, *outs))
    return {"eager": step(case.eager), "ours": step(case.ours), "compiled": step(compiled)}, size


def seconds(run: Callable[[], None], repeats: int, device: torch.device) -> float:
    """Of one forward and backward, the mean of `repeats`."""
    if device.type == "cuda":
        begin_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin_event.record()
    begin = time.process_time()
    for _ in range(repeats):
        run()
    if device.type != "cuda":
        return (time.process_time() - begin) / repeats
    end_event.record()
    end_event.synchronize()
    return begin_event.elapsed_time(end_event) / 1e3 / repeats


def measure(case: Case, rounds: int, repeats: int, device: torch.device) -> dict[str, float | bool]:
    contenders, size = steps(case)
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for run in contenders.values():
        seconds(run, repeats, device)  # compiles and warms up
    for _ in range(rounds):
        for name, run in contenders.items():
            times[name].append(seconds(run, repeats, device))
    middle = {name: statistics.median(found) for name, found in times.items()}
    return {
        "ours_to_eager": round(middle["ours"] / middle["eager"], 3),
        "compiled_to_eager": round(middle["compiled"] / middle["eager"], 3),
        "ours_to_eager_minima": round(min(times["ours"]) / min(times["eager"]), 3),
        "compiled_to_eager_minima": round(min(times["compiled"]) / min(times["eager"]), 3),
        "eager_us": round(1e6 * middle["eager"], 1),
        "our_GB_per_s": round(size / middle["ours"] / 1e9, 1),
        "kernel wanted": middle["ours"] > 1.1 * middle["compiled"],
    }


def main() -> None:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8_192 if gpu else 256)
    parser.add_argument("--width", type=int, default=2_048 if gpu else 256)
    parser.add_argument("--rounds", type=int, default=15, help="interleaved measurements")
    parser.add_argument("--repeats", type=int, default=20, help="forwards and backwards of one measurement")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    device, dtype = (torch.device("cuda"), torch.bfloat16) if gpu else (torch.device("cpu"), torch.float32)
    machine = {"device": torch.cuda.get_device_name() if gpu else "cpu", "torch": torch.__version__}
    for name, case in cases(options.tokens, options.width, device, dtype).items():
        result = measure(case, options.rounds, options.repeats, device)
        size = {"tokens": options.tokens, "width": options.width}
        print(json.dumps({"operation": name, **size, **result, **machine}), flush=True)


if __name__ == "__main__":
    main()
