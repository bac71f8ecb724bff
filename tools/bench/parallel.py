"""What parallelism costs: tensor parallel, pipeline and ZeRO-3 steps against the same model without them.

    python tools/bench/parallel.py                   # all of them, JSON lines; some minutes
    python tools/bench/parallel.py --only zero

Starts its own gloo ranks, one thread each. Both sides of a ratio run in turn in the same processes, so that a noisy
machine disturbs both.

tensor     CPU time of two tensor-parallel ranks together, over that of one process; forward, loss and backward
sum        CPU time of the all-reduce that two tensor-parallel ranks do, over gloo's own
pipeline   throughput of two pipeline ranks with 8 microbatches, over that of two one-rank runs at the same time, as a
           share of the most that a pipeline can have, m / (m + p - 1); wall-clock time, so the machine must be idle
zero       CPU time of a whole step (clipping and AdamW too) of this trainer's ZeRO-3 on one rank, over plain torch,
           over DeepSpeed's own ZeRO-3 with a leaf module a layer, and over FSDP2
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, TypedDict, cast

import torch
import torch.distributed as dist
from torch import nn

from megatron_gemini.config.data import DataConfig
from megatron_gemini.config.encoders import AudioConfig, VisionConfig
from megatron_gemini.config.engine import EngineConfig, ParallelConfig
from megatron_gemini.config.model import ModelConfig
from megatron_gemini.config.run import RunConfig
from megatron_gemini.config.schema import Given
from megatron_gemini.config.training import TrainConfig
from megatron_gemini.contracts import Batch, StepRows, TokenLayout
from megatron_gemini.engine.distributed import choose_device, end_process, join, leave
from megatron_gemini.engine.multimodal import MultimodalEngine
from megatron_gemini.engine.optimizer import parameter_groups
from megatron_gemini.models.decoder import DecoderLayer
from megatron_gemini.models.gemini import Gemini
from megatron_gemini.models.heads import NextTokenLoss
from megatron_gemini.parallel import collectives
from megatron_gemini.parallel.parameters import initialize
from megatron_gemini.parallel.tensor.layers import LayerFactory
from megatron_gemini.parallel.topology import Topology, build_topology
from megatron_gemini.training.quiet import quiet_warnings


class ZeroCase(TypedDict, total=False):
    """Sizes of a model, and the most that a step may cost as a multiple of the named one's."""

    layers: int
    width: int
    tokens: int
    plain_bound: float
    deepspeed_bound: float


ZERO_CASES: tuple[ZeroCase, ...] = (
    {"layers": 4, "width": 256, "tokens": 256, "plain_bound": 1.5},
    {"layers": 32, "width": 64, "tokens": 16, "deepspeed_bound": 0.7},
)
MICROBATCHES = 8
Step = Callable[[], Any]
Line = dict[str, Given]


Z_LOSS = 1e-4


def configuration(layers: int, width: int, heads: int, tokens: int, vocabulary: int, **more: Any) -> RunConfig:
    """A text-only model. more: fields of `engine` and `parallel`."""
    parallel = {key: more.pop(key) for key in ("tensor", "pipeline") if key in more}
    rows = more.pop("rows", 1)
    model = ModelConfig(width=width, layers=layers, heads=heads, head_width=width // heads, mlp_width=4 * width)
    return RunConfig(
        model=model,
        encoders={"vision": VisionConfig(enabled=False), "audio": AudioConfig(enabled=False)},
        data=DataConfig(row_tokens=tokens),
        parallel=ParallelConfig(**parallel),
        engine=EngineConfig(offload_optimizer="none", **more),
        train=TrainConfig(rows_per_step=rows),
    )


def layout_of(vocabulary: int) -> TokenLayout:
    return TokenLayout(vocabulary - TokenLayout(1).size + 1)


def row(tokens: int, layout: TokenLayout) -> Batch:
    """One document that fills a row."""
    token = torch.randint(layout.text_size, (tokens + 1,), generator=torch.Generator().manual_seed(0))
    one = torch.ones(tokens, dtype=torch.int32)
    return Batch(
        token[:-1], token[1:], torch.ones(tokens), torch.arange(tokens), one, one * 0, (one * 0).to(torch.int8)
    )


def cpu_seconds(step: Step, repeats: int) -> float:
    begin = time.process_time()
    for _ in range(repeats):
        step()
    return (time.process_time() - begin) / repeats


def wall_seconds(step: Step, repeats: int) -> float:
    begin = time.perf_counter()
    for _ in range(repeats):
        step()
    return (time.perf_counter() - begin) / repeats


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    return {
        "medians": round(statistics.median(ours) / statistics.median(theirs), 3),
        "minima": round(min(ours) / min(theirs), 3),
    }


def forward_backward(model: nn.Module, batch: Batch) -> Step:
    def step() -> None:
        model.zero_grad(set_to_none=True)
        model(batch).loss.backward()

    return step


def next_token_loss(layout: TokenLayout) -> NextTokenLoss:
    return NextTokenLoss(len(layout.targets), Z_LOSS)


def serial_model(config: RunConfig, layout: TokenLayout) -> Gemini:
    model = Gemini(config, layout, LayerFactory(Topology.serial()), next_token_loss(layout))
    initialize(model, 0)
    return model


def tensor(pairs: int) -> list[Line]:
    """On two ranks. While rank 0 is the one process, the other sleeps in a barrier. Cores that share a cache are slower
    together, so there is a second line: to one process while the other rank runs the same by itself."""
    layout = layout_of(8192)
    config = configuration(8, 512, 8, 1024, 8192, tensor=2)
    topology, batch = build_topology(config.parallel, "gloo"), row(1024, layout)
    tensor_parallel = Gemini(config, layout, LayerFactory(topology), next_token_loss(layout))
    initialize(tensor_parallel, 0)
    alone, both = forward_backward(serial_model(config, layout), batch), forward_backward(tensor_parallel, batch)
    seconds: list[list[float]] = []
    for _ in range(pairs + 1):
        single = cpu_seconds(alone, 1) if topology.rank == 0 else 0.0
        dist.barrier()
        one_of_two = cpu_seconds(alone, 1)
        dist.barrier()
        sums = torch.tensor([cpu_seconds(both, 1), single, one_of_two / 2], dtype=torch.float64)
        dist.all_reduce(sums)
        seconds.append(sums.tolist())
    ours, by_itself, beside = (list(column) for column in zip(*seconds[1:], strict=True))  # the first is warm-up
    return [
        {"case": "tensor", "bound": 1.10, **ratios(ours, by_itself)},
        {"case": "tensor, both cores busy", "bound": 1.10, **ratios(ours, beside)},
    ]


def pair_sum(pairs: int) -> Line:
    """The all-reduce of two gloo ranks, as tensor-parallel ones do it: 16 sums of 2 MiB."""
    x, group = torch.zeros(1024, 512), dist.group.WORLD
    assert group is not None

    def summed(all_reduce: Callable[[], Any]) -> float:
        dist.barrier()
        seconds = torch.tensor(cpu_seconds(lambda: all_reduce().wait(), 16), dtype=torch.float64)
        dist.all_reduce(seconds)
        return float(seconds)

    found = [
        (summed(lambda: collectives.all_reduce(x, group)), summed(lambda: dist.all_reduce(x, async_op=True)))
        for _ in range(pairs + 1)
    ]
    ours, theirs = zip(*found[1:], strict=True)
    return {"case": "sum of two ranks, to gloo's all-reduce", **ratios(ours, theirs)}


def whole_step(batches: list[Batch], rank: int) -> StepRows:
    """A global step of these rows, all read by rank 0 and known to all."""
    return StepRows(batches, {} if rank else dict(enumerate(batches)), [0] * len(batches))


def engine_step(engine: MultimodalEngine, batches: list[Batch]) -> Step:
    rows = whole_step(batches, engine.topology.rank)

    def step() -> None:
        for part in engine.parts:
            part.module.zero_grad(set_to_none=True)
        engine.forward_backward(rows, 1.0, lambda output: None)

    return step


def pipeline(pairs: int) -> Line:
    """On two ranks: a pipeline over both, and a run of its own on each at the same time."""
    layout, tokens = layout_of(1024), 512
    config = configuration(8, 512, 8, tokens, 1024, pipeline=2, rows=MICROBATCHES, zero_stage=0)
    topology, batches = build_topology(config.parallel, "gloo"), [row(tokens, layout)] * MICROBATCHES
    device = torch.device("cpu")
    alone = [dist.new_group([rank]) for rank in range(topology.world)][topology.rank]
    own = Topology(world=topology.world, rank=topology.rank, tensor_group=alone, data_group=alone, shard_group=alone)
    single = dataclasses.replace(config, parallel=ParallelConfig())
    together = engine_step(MultimodalEngine(config, layout, topology, device, next_token_loss(layout)), batches)
    apart = engine_step(
        MultimodalEngine(single, layout, dataclasses.replace(own, world=1), device, next_token_loss(layout)), batches
    )
    ours, theirs = [], []
    for number in range(pairs + 1):
        times = []
        for step in (together, apart):
            dist.barrier()
            slowest = torch.tensor(wall_seconds(step, 1), dtype=torch.float64)
            dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
            times.append(float(slowest))
        if number:
            ours.append(times[0])
            theirs.append(times[1])
    ideal = MICROBATCHES / (MICROBATCHES + topology.pipeline_size - 1)
    found = {
        name: round(1 / (value * topology.pipeline_size) / ideal, 3) for name, value in ratios(ours, theirs).items()
    }
    return {"case": "pipeline", "bound": 0.95, **found}


def optimizer_step(model: nn.Module, batch: Batch, config: RunConfig) -> Step:
    """Forward, backward, clipping and AdamW in plain torch."""
    groups = parameter_groups(model.named_parameters(), config.optimizer.weight_decay, {})
    optimizer = torch.optim.AdamW([{**group} for group in groups], lr=1e-5, fused=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        model(batch).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def deepspeed_step(config: RunConfig, layout: TokenLayout, batch: Batch) -> Step:
    """DeepSpeed's ZeRO-3 as its documentation has it, a decoder layer being a leaf module."""
    import deepspeed

    model = serial_model(config, layout)
    deepspeed.utils.set_z3_leaf_modules(model, [DecoderLayer])
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 3},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-5, "torch_adam": True}},
    }
    engine, *_ = deepspeed.initialize(model=model, config=settings, model_parameters=model.parameters())

    def step() -> None:
        engine.backward(engine(batch).loss)
        engine.step()

    return step


def fsdp_step(config: RunConfig, layout: TokenLayout, batch: Batch) -> Step:
    """PyTorch's FSDP2, one unit a decoder layer."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = serial_model(config, layout)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    groups = parameter_groups(model.named_parameters(), config.optimizer.weight_decay, {})
    decayed = {name for name, p in model.named_parameters() if any(p is q for q in groups[0]["params"])}
    for layer in model.decoder.layers.values():
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    named = dict(model.named_parameters())
    rates = ((decayed, config.optimizer.weight_decay), (set(named) - decayed, 0.0))
    optimizer = torch.optim.AdamW(
        [{"params": [named[name] for name in sorted(names)], "weight_decay": rate} for names, rate in rates], lr=1e-5
    )

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        model(batch).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def our_step(config: RunConfig, layout: TokenLayout, batch: Batch) -> Step:
    engine = MultimodalEngine(config, layout, Topology.serial(), torch.device("cpu"), next_token_loss(layout))

    def step() -> None:
        engine.forward_backward(whole_step([batch], 0), 1.0, lambda output: None)
        engine.step(1e-5)

    return step


def zero(pairs: int) -> list[Line]:
    """On one rank."""
    found: list[Line] = []
    for case in ZERO_CASES:
        layout = layout_of(1024)
        config = configuration(case["layers"], case["width"], 4, case["tokens"], 1024, zero_stage=3)
        batch = row(case["tokens"], layout)
        steps = {
            "ours": our_step(config, layout, batch),
            "plain": optimizer_step(serial_model(config, layout), batch, config),
            "deepspeed": deepspeed_step(config, layout, batch),
            "fsdp2": fsdp_step(config, layout, batch),
        }
        times: dict[str, list[float]] = {name: [] for name in steps}
        for number in range(pairs + 1):
            for name, step in steps.items():
                seconds = cpu_seconds(step, 3)
                if number:
                    times[name].append(seconds)
        over = {f"ours_over_{name}": ratios(times["ours"], times[name]) for name in ("plain", "deepspeed", "fsdp2")}
        more = {f"{name}_over_plain": ratios(times[name], times["plain"]) for name in ("deepspeed", "fsdp2")}
        found.append({"case": "zero", **cast("Line", case), **over, **more})
    return found


CASES: dict[str, tuple[int, Callable[[int], Line | list[Line]]]] = {
    "tensor": (2, tensor),
    "sum": (2, pair_sum),
    "pipeline": (2, pipeline),
    "zero": (1, zero),
}


def rank(name: str, pairs: int) -> None:
    """One rank of a case."""
    torch.set_num_threads(1)
    quiet_warnings()
    join(choose_device())
    found = CASES[name][1](pairs)
    if dist.get_rank() == 0:
        for line in found if isinstance(found, list) else [found]:
            print(json.dumps({**line, "pairs": pairs, "torch": torch.__version__}), flush=True)
    leave()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=sorted(CASES))
    parser.add_argument("--pairs", type=int, default=10, help="interleaved measurements")
    parser.add_argument("--rank-of", choices=sorted(CASES), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank_of:
        rank(options.rank_of, options.pairs)
        end_process()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    for name in [options.only] if options.only else CASES:
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(CASES[name][0])]
        command = [sys.executable, *launch, __file__, "--rank-of", name, "--pairs", str(options.pairs)]
        subprocess.run(command, env=environment, check=True)


if __name__ == "__main__":
    main()
