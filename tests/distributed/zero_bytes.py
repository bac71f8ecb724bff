"""Counts what DeepSpeed engines of the small decoder really hold on the ranks of one launch, and prints it as JSON.

    torchrun --nproc-per-node 2 -m tests.distributed.zero_bytes OUT.json '[{"zero_stage": 3, ...}, ...]'

Every engine takes a step and half of the next one; then all tensors that it has made and not given back are added up,
every storage once. On a CPU what is offloaded and what is not lie in the same memory.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_gemini.config.engine import ParallelConfig
from megatron_gemini.engine.deepspeed_config import deepspeed_config
from megatron_gemini.engine.distributed import choose_device, end_process, join, leave
from megatron_gemini.engine.groups import EngineGroups
from megatron_gemini.engine.zero import ZeroEngine
from megatron_gemini.models.stage import DecoderStage, StageInput
from megatron_gemini.parallel.tensor.layers import LayerFactory
from megatron_gemini.parallel.topology import Topology, build_topology
from megatron_gemini.training.quiet import quiet_warnings
from tests.distributed.rows import LAYOUT, loss_of, rows
from tests.distributed.zero_case import case

BUCKETS = ("reduce_bucket_size", "allgather_bucket_size", "stage3_prefetch_bucket_size")


def storages() -> dict[int, torch.UntypedStorage]:
    """Of all tensors that Python can reach, and of their gradients, by address."""
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        if not isinstance(thing, torch.Tensor):
            continue
        for tensor in (thing, thing.grad if thing.is_leaf else None):
            if tensor is not None and tensor.device.type == "cpu" and tensor.layout == torch.strided:
                storage = tensor.untyped_storage()
                found[storage.data_ptr()] = storage
    found.pop(0, None)
    return found


def held(engine: dict[str, Any], topology: Topology, folder: Path) -> list[int]:
    """[bytes that this rank holds in the middle of a step, parameters, those of the largest]."""
    json_file = folder / "buckets.json"
    config = case(engine)
    config = dataclasses.replace(config, engine=dataclasses.replace(config.engine, deepspeed_config=str(json_file)))
    settings = deepspeed_config(config, 2, topology.shard_size)
    before = storages()  # kept, so that no address of theirs is used again
    zero = ZeroEngine(
        lambda: DecoderStage(config, LAYOUT, LayerFactory(topology), loss=loss_of(config)),
        config,
        EngineGroups.of_decoder(topology),
        settings,
        torch.device("cpu"),
    )
    counts = [getattr(p, "ds_numel", p.numel()) for p in zero.module.parameters()]
    row = StageInput(rows(0)[1])  # text only
    for boundary in (False, True):
        zero.backward(zero.forward(row=row).loss, boundary)
    zero.wait()
    zero.step(1e-3, torch.tensor(1.0))
    zero.backward(zero.forward(row=row).loss, boundary=False)
    zero.wait()
    after = storages()
    return [sum(s.nbytes() for address, s in after.items() if address not in before), sum(counts), max(counts)]


def main() -> None:
    out, engines = Path(sys.argv[1]), json.loads(sys.argv[2])
    quiet_warnings()
    join(choose_device())
    topology = build_topology(ParallelConfig(), "gloo")
    if topology.rank == 0:
        (out.parent / "buckets.json").write_text(json.dumps({"zero_optimization": dict.fromkeys(BUCKETS, 1000)}))
    dist.barrier()
    mine = [held(engine, topology, out.parent) for engine in engines]
    gathered: list[Any] = [None] * topology.world
    dist.all_gather_object(gathered, mine)
    if topology.rank == 0:
        out.write_text(json.dumps(gathered))
    leave()


if __name__ == "__main__":
    main()
    end_process()
