"""Time and peak memory of the losses against torch's, against a compiled chunked loss and, on a GPU, against Liger.

    python tools/bench/loss.py                       # on a CPU: V=65,536, T=1,024, D=512 in float32; the sigmoid loss
    python tools/bench/loss.py                       # on a GPU: V=262,144, T=8,192, D=2,048 in bfloat16; the same
    python tools/bench/loss.py --vocabulary 32000 --tokens 512 --width 256 --rounds 9

One JSON line a contender: forward and backward, interleaved in one process, as ratios to torch's (`F.linear` and
`F.cross_entropy`; for the sigmoid loss the dense matrix). Time is the process's CPU time on a CPU, one thread, and the
device's on a GPU. Memory is the peak above inputs and returned gradients, of torch's own allocations. Liger takes part
where `pip install liger-kernel` has been done. A GPU needs about two minutes, most of it compilation.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import time
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from megatron_gemini.kernels.losses.dispatch import loss_backend
from megatron_gemini.kernels.losses.linear_cross_entropy import linear_cross_entropy
from megatron_gemini.kernels.losses.sigmoid import sigmoid_contrastive_loss

Step = Callable[[], None]


def peak_bytes(step: Step, device: torch.device) -> int:
    """The most memory that is allocated at once during the step, beyond what was allocated before it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        step()
    events = [event for event in trace.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def seconds(step: Step, device: torch.device) -> float:
    if device.type != "cuda":
        begin = time.process_time()
        step()
        return time.process_time() - begin
    begin_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin_event.record()
    step()
    end_event.record()
    end_event.synchronize()
    return begin_event.elapsed_time(end_event) / 1e3


def compare(
    steps: dict[str, Step], leaves: Iterable[torch.Tensor], rounds: int, device: torch.device
) -> list[dict[str, str | float]]:
    """Of every contender, time and memory; the first one is what the ratios refer to."""
    leaves = list(leaves)
    returned = sum(leaf.numel() * leaf.itemsize for leaf in leaves)

    def fresh(step: Step) -> Step:
        for leaf in leaves:
            leaf.grad = None
        return step

    times: dict[str, list[float]] = {name: [] for name in steps}
    peaks = {}
    for name, step in steps.items():
        fresh(step)()  # compiles and fills caches
        peaks[name] = peak_bytes(fresh(step), device) - returned
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(seconds(fresh(step), device))
    first = next(iter(steps))
    return [
        {
            "contender": name,
            "time_ratio_of_medians": round(statistics.median(times[name]) / statistics.median(times[first]), 3),
            "time_ratio_of_minima": round(min(times[name]) / min(times[first]), 3),
            "memory_ratio": round(peaks[name] / peaks[first], 4),
            "median_ms": round(1e3 * statistics.median(times[name]), 2),
            "peak_MiB_above_inputs_and_gradients": round(peaks[name] / 2**20, 1),
        }
        for name in steps
    ]


def cross_entropies(
    tokens: int, vocabulary: int, width: int, device: torch.device
) -> tuple[dict[str, Step], list[torch.Tensor]]:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    h = torch.randn(tokens, width, device=device, dtype=dtype).requires_grad_()
    weight = (torch.randn(vocabulary, width, device=device, dtype=dtype) * width**-0.5).requires_grad_()
    target = torch.randint(vocabulary, (tokens,), device=device)
    ones = torch.ones(tokens, device=device)

    def ours(**options: object) -> None:
        place = {"z_loss": 0.0, "first": 0, "size": vocabulary, "group": None}
        linear_cross_entropy(h, weight, target, ones, **place, **options)[0].backward()  # type: ignore[arg-type]

    def dense(h: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(F.linear(h, weight).float(), target, reduction="sum")

    compiled = torch.compile(dense)
    chunk = max(1, (1 << 30 if device.type == "cuda" else 64 << 20) // (vocabulary * h.itemsize))

    def compiled_chunks() -> None:
        leaf = h.detach().requires_grad_()
        for part, targets in zip(leaf.split(chunk), target.split(chunk), strict=True):
            compiled(part, weight, targets).backward()
        h.grad = leaf.grad

    steps: dict[str, Step] = {
        "torch": lambda: dense(h, weight, target).backward(),
        "ours": ours,
        "ours, deferred": lambda: ours(deferred=True),
        "compiled chunks": compiled_chunks,
    }
    if device.type == "cuda":
        steps["ours, torch backend"] = lambda: ours(backend="torch")
        if importlib.util.find_spec("liger_kernel") is not None:
            from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

            liger = LigerFusedLinearCrossEntropyLoss(reduction="sum")
            steps["liger"] = lambda: liger(weight, h, target).backward()
    return steps, [h, weight]


def sigmoid_losses(pairs: int, width: int, device: torch.device) -> tuple[dict[str, Step], list[torch.Tensor]]:
    image, text = (F.normalize(torch.randn(pairs, width, device=device), dim=1).requires_grad_() for _ in range(2))
    log_temperature = torch.tensor(10.0, device=device).log().requires_grad_()
    bias = torch.tensor(-10.0, device=device, requires_grad=True)
    inputs = (image, text, log_temperature, bias)

    def dense() -> None:
        logits = image @ text.t() * log_temperature.exp() + bias
        sign = 2 * torch.eye(pairs, device=device) - 1
        (-F.logsigmoid(sign * logits).sum()).backward()

    return {"dense": dense, "ours": lambda: sigmoid_contrastive_loss(*inputs).backward()}, list(inputs)


def main() -> None:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=262_144 if gpu else 65_536)
    parser.add_argument("--tokens", type=int, default=8_192 if gpu else 1_024)
    parser.add_argument("--width", type=int, default=2_048 if gpu else 512)
    parser.add_argument("--pairs", type=int, default=16_384 if gpu else 4_096, help="of the sigmoid loss")
    parser.add_argument("--rounds", type=int, default=20 if gpu else 5, help="interleaved measurements")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    device = torch.device("cuda" if gpu else "cpu")
    machine = {"device": torch.cuda.get_device_name() if gpu else "cpu", "torch": torch.__version__}
    size = {"vocabulary": options.vocabulary, "tokens": options.tokens, "width": options.width}
    steps, leaves = cross_entropies(options.tokens, options.vocabulary, options.width, device)
    for result in compare(steps, leaves, options.rounds, device):
        print(json.dumps({**size, **result, "backend": loss_backend(device)[0], **machine}), flush=True)
    steps, leaves = sigmoid_losses(options.pairs, options.width, device)
    for result in compare(steps, leaves, options.rounds, device):
        print(json.dumps({"pairs": options.pairs, "width": options.width, **result, **machine}), flush=True)


if __name__ == "__main__":
    main()
