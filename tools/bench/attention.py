"""Attention on packed rows against the best alternatives, on the same inputs in one run.

    python tools/bench/attention.py                  # the CPU's three comparisons, one thread, JSON lines
    python tools/bench/attention.py --device cuda    # one card, under ten minutes: all backends, TFLOP/s, ratios
    python tools/bench/attention.py --device cuda --tune --widths 128    # times of other block sizes, as long

Forward and backward of N query heads and K key/value heads of width H. The candidates of a comparison run in turn, so
that a noisy machine disturbs all of them; times are medians and minima, on CPU of the process's CPU time. TFLOP/s count
the pairs of a query and a key that see each other, 4 H operations a pair and head forward and 10 H backward.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_gemini.config.schema import Given
from megatron_gemini.kernels.attention.api import AttentionPlan, attention, plan_attention
from megatron_gemini.kernels.attention.dispatch import BACKENDS
from megatron_gemini.kernels.attention.plan import SelfAttentionPlan

SIZES = tuple(itertools.product((32, 64, 128), (32, 64, 128), (8,), (2, 3)))
"""Fields of `tiling.Tiling` that --tune tries."""

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Row:
    """Documents, each with an image of `image` tokens (0: none) in every `image_every` of its tokens."""

    documents: tuple[int, ...]
    image: int = 0
    image_every: int = 1

    def plan(self, device: str) -> SelfAttentionPlan:
        lengths = torch.tensor(self.documents)
        segment = torch.repeat_interleave(torch.arange(len(lengths)) + 1, lengths).int()
        span, start = torch.zeros_like(segment), 0
        for length in self.documents:
            for begin in range(start + self.image_every // 4, start + length - self.image, self.image_every):
                span[begin : begin + self.image] = begin + 1 if self.image else 0
            start += length
        return plan_attention(segment.to(device), span.to(device))


def pairs_seen(plan: AttentionPlan) -> int:
    start, reach = plan.bounds.query_2Q.long()
    return int((reach - start).clamp(min=0).sum())


def dense_mask(plan: AttentionPlan) -> torch.Tensor:
    start, reach = plan.bounds.query_2Q[..., None]
    key = torch.arange(plan.tokens, device=start.device)
    return (key >= start) & (key < reach)


def ours(plan: AttentionPlan, backend: str | None = None) -> Attend:
    return lambda q, k, v: attention(q, k, v, plan, backend=backend)


def padded(documents: int) -> Attend:
    """SDPA, causal, of a batch of `documents` sequences of one length, back to back."""

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (x.unflatten(0, (documents, -1)).transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2).flatten(0, 1)

    return attend


def masked(mask_TT: torch.Tensor) -> Attend:
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask_TT, enable_gqa=True)[0].transpose(0, 1)

    return attend


def by_kernel(backend: SDPBackend) -> Attend:
    """Causal SDPA of one document by one of torch's own kernels."""

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(backend):
            return padded(1)(q, k, v)

    return attend


class Runner:
    """Times forward and backward of one candidate on one row; on CUDA by events, on CPU by the process's time."""

    def __init__(
        self, attend: Attend, tokens: int, shape: tuple[int, int, int], device: str, dtype: torch.dtype
    ) -> None:
        heads, kv_heads, width = shape
        generator = torch.Generator(device).manual_seed(0)
        self.attend = attend
        self.inputs = [
            torch.randn(tokens, n, width, generator=generator, device=device, dtype=dtype).requires_grad_()
            for n in (heads, kv_heads, kv_heads)
        ]
        self.grad = torch.randn(tokens, heads, width, generator=generator, device=device, dtype=dtype)
        self.seconds: list[tuple[float, float]] = []

    def __call__(self) -> None:
        marks = [self._mark()]
        out = self.attend(*self.inputs)
        marks.append(self._mark())
        torch.autograd.grad(out, self.inputs, self.grad)
        marks.append(self._mark())
        self.seconds.append((self._between(*marks[:2]), self._between(*marks[1:])))

    def _mark(self) -> float | torch.cuda.Event:
        if self.grad.device.type == "cpu":
            return time.process_time()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, begin: float | torch.cuda.Event, end: float | torch.cuda.Event) -> float:
        if isinstance(begin, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
            end.synchronize()
            return begin.elapsed_time(end) / 1e3
        assert isinstance(begin, float) and isinstance(end, float)
        return end - begin

    def columns(self) -> dict[str, list[float]]:
        forward, backward = (list(column) for column in zip(*self.seconds, strict=True))
        return {"forward": forward, "backward": backward, "both": [a + b for a, b in self.seconds]}


def in_turn(candidates: dict[str, Runner], rounds: int) -> dict[str, Runner]:
    """Those that can run, each timed `rounds` times after two runs that are not counted."""
    able = {}
    for name, runner in candidates.items():
        try:
            for _ in range(2):
                runner()
            runner.seconds.clear()
            able[name] = runner
        except Exception as error:  # whatever a library raises where it does not take this card or head width
            print(json.dumps({"candidate": name, "unable": str(error).splitlines()[0]}), flush=True)
    for _ in range(rounds):
        for runner in able.values():
            runner()
    return able


def compare_on_cpu(rounds: int) -> Iterator[dict[str, Given]]:
    """The comparisons that have a bound; ratio: ours to the other, forward and backward together."""
    shape, mixed = (8, 1, 64), Row((1024, 512, 256, 256), image=192, image_every=256).plan("cpu")
    comparisons = [
        (
            "packed 1024 + 512 + 256 + 256 : padded",
            Row((1024, 512, 256, 256)).plan("cpu"),
            padded(4),
            4096,
            0.40,
        ),
        ("mixed mask : SDPA with a dense mask", mixed, masked(dense_mask(mixed)), 2048, 0.30),
        ("64 documents of 32 : padded", Row((32,) * 64).plan("cpu"), padded(64), 2048, 1.1),
    ]
    for name, plan, other, tokens, bound in comparisons:
        pair = {
            "ours": Runner(ours(plan), plan.tokens, shape, "cpu", torch.float32),
            "other": Runner(other, tokens, shape, "cpu", torch.float32),
        }
        times = {key: runner.columns()["both"] for key, runner in in_turn(pair, rounds).items()}
        ratios = {
            f"ratio_of_{kind.__name__}s": round(kind(times["ours"]) / kind(times["other"]), 3)
            for kind in (statistics.median, min)
        }
        yield {"case": name, **ratios, "bound": bound, "our_ms": round(1e3 * min(times["ours"]), 2)}


def time_of_metadata(device: str) -> dict[str, Given]:
    """What is made once a microbatch for our kernels, for 64k tokens; wall clock."""
    row = Row((4096,) * 16, image=256, image_every=1024)
    segment, span = row.plan("cpu").segment_T, row.plan("cpu").span_T
    seconds: dict[str, list[float]] = {"check": [], "bounds": [], "orders": []}
    for _ in range(30):
        marks = [time.perf_counter()]
        plan = plan_attention(segment.to(device), span.to(device))
        marks.append(time.perf_counter())
        bounds = plan.bounds
        marks.append(time.perf_counter())
        for kind, group, block in (("query", 16, 128), ("query", 16, 64), ("key", 1, 128)):
            bounds.order(kind, group, block)
        marks.append(time.perf_counter())
        for name, begin, end in zip(seconds, marks, marks[1:], strict=False):
            seconds[name].append(end - begin)
    return {"case": "metadata of 65,536 tokens", **{f"{k}_us": round(1e6 * min(v), 1) for k, v in seconds.items()}}


def candidates_for(plan: AttentionPlan, causal: bool, dense: bool) -> dict[str, Attend]:
    """Every backend of ours; one causal document also by torch's kernels, a mixed row also with a dense mask."""
    found: dict[str, Attend] = {b.name: ours(plan, b.name) for b in BACKENDS if b.name != "cpu"}
    if causal:
        found["SDPA's flash"] = by_kernel(SDPBackend.FLASH_ATTENTION)
        found["SDPA's cuDNN"] = by_kernel(SDPBackend.CUDNN_ATTENTION)
    if dense:
        found["SDPA, dense mask"] = masked(dense_mask(plan))
    return found


def compare_on_card(
    device: str, dtype: torch.dtype, tokens: int, widths: tuple[int, ...], heads: tuple[int, ...], rounds: int
) -> Iterator[dict[str, Given]]:
    """One causal document, and documents with images, at every head width and number of heads."""
    rows = {
        "causal": Row((tokens,)),
        "mixed": Row((tokens // 2, tokens // 4, tokens // 8, tokens // 8), tokens // 32, tokens // 16),
    }
    for width, count, (name, row) in itertools.product(widths, heads, rows.items()):
        plan = row.plan(device)
        attends = candidates_for(plan, name == "causal", name == "mixed" and count == heads[0])
        runners = {key: Runner(a, tokens, (count, 1, width), device, dtype) for key, a in attends.items()}
        able = in_turn(runners, rounds)
        operations = pairs_seen(plan) * count * width
        for key, runner in able.items():
            median = {part: statistics.median(column) for part, column in runner.columns().items()}
            yield {
                "case": f"{name}, {tokens} tokens, {count} heads of {width}",
                "candidate": key,
                "forward_ms": round(1e3 * median["forward"], 3),
                "backward_ms": round(1e3 * median["backward"], 3),
                "forward_tflops": round(4 * operations / median["forward"] / 1e12, 1),
                "backward_tflops": round(10 * operations / median["backward"] / 1e12, 1),
            }


def tune(
    device: str,
    dtype: torch.dtype,
    tokens: int,
    widths: tuple[int, ...],
    heads: int,
    sizes: Sequence[tuple[int, ...]] = SIZES,
) -> Iterator[dict[str, Given]]:
    """Each kernel's time with other block sizes, the others' left as the table has them."""
    from megatron_gemini.kernels.attention.triton import tiling  # the other comparisons run without triton

    plan, tables = Row((tokens,)).plan(device), tiling.TILINGS
    table = "hopper" if tiling.is_hopper(torch.device(device)) else "ampere"
    for width, kernel in itertools.product(widths, ("forward", "query_gradient", "key_gradient")):
        for choice in itertools.starmap(tiling.Tiling, sizes):
            kept = tables[table][tiling.padded_width(width)]
            fields = {name: getattr(kept, name) for name in ("forward", "query_gradient", "key_gradient")}
            changed = tiling.Tilings(**{**fields, kernel: choice})
            tables[table][tiling.padded_width(width)] = changed
            runner = Runner(ours(plan, "triton"), tokens, (heads, 1, width), device, dtype)
            able = in_turn({str(choice): runner}, 5)
            tables[table][tiling.padded_width(width)] = kept
            if able:
                part = "forward" if kernel == "forward" else "backward"
                best = min(runner.columns()[part])
                yield {"width": width, "kernel": kernel, "tiling": str(choice), f"{part}_ms": round(1e3 * best, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=10, help="times every candidate runs (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=8192, help="of a row on the card (default: %(default)s)")
    parser.add_argument("--widths", type=int, nargs="+", default=[128, 256], help="of heads (default: %(default)s)")
    parser.add_argument("--tune", action="store_true", help="time block sizes instead")
    options = parser.parse_args()
    if options.tune and importlib.util.find_spec("triton") is None:
        parser.error("--tune needs triton, which is not installed; `bash tools/install.sh dev` installs it")
    torch.set_num_threads(1)
    print(json.dumps({"torch": torch.__version__, "device": options.device}), flush=True)
    card = (options.device, torch.bfloat16, options.tokens, tuple(options.widths))
    if options.tune:
        found = tune(*card, heads=16)
    elif options.device == "cuda":
        found = compare_on_card(*card, heads=(8, 16, 32), rounds=options.rounds)
    else:
        found = compare_on_cpu(options.rounds)
    for result in found:
        print(json.dumps(result), flush=True)
    print(json.dumps(time_of_metadata(options.device)), flush=True)


if __name__ == "__main__":
    main()
