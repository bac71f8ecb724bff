"""One rank of the tensor-parallel test: builds every case from the seed, runs a row, and gathers what it computed.

    torchrun --nproc-per-node N -m tests.distributed.tensor_cases OUT CASE...

Rank 0 writes, for every case, the loss, the gathered weights and gradients, and the other ranks' copies of what is
replicated. It knows nothing of the serial result.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from megatron_gemini.config.engine import ParallelConfig
from megatron_gemini.config.run import RunConfig
from megatron_gemini.models.gemini import Gemini
from megatron_gemini.parallel.layers import Layers
from megatron_gemini.parallel.parameters import initialize, placement_of
from megatron_gemini.parallel.topology import Topology, build_topology
from tests.distributed.rows import CONFIG, LAYOUT, rows

CASES = {
    "mqa": {},
    "mqa-untied": {"tie_embeddings": False, "activation": "silu"},
    "gqa": {"kv_heads": 2},
    "gqa-untied": {"kv_heads": 2, "tie_embeddings": False, "qk_norm": False},
}
ROW = 3  # a picture, speech, image codes and text


def case_config(name: str) -> RunConfig:
    model = dataclasses.replace(CONFIG.model, init_std=0.2, **CASES[name])
    return dataclasses.replace(CONFIG, model=model)


def run(config: RunConfig, topology: Topology) -> tuple[Gemini, torch.Tensor]:
    """The model after one forward and backward, and the loss."""
    model = Gemini(config, LAYOUT, Layers(topology))
    initialize(model, seed=7)
    loss = model(rows(0)[ROW]).loss
    loss.backward()
    return model, loss.detach()


def gathered(name: str, topology: Topology) -> dict[str, torch.Tensor]:
    config = dataclasses.replace(case_config(name), parallel=ParallelConfig(topology.tensor_size))
    model, loss = run(config, topology)
    found = {"loss": loss}
    for parameter_name, parameter in model.named_parameters():
        placement = placement_of(parameter)
        for kind, tensor in (("weight", parameter.detach()), ("grad", parameter.grad)):
            pieces = [torch.empty_like(tensor) for _ in range(topology.tensor_size)]
            dist.all_gather(pieces, tensor.contiguous(), group=topology.tensor_group)
            whole = torch.stack(pieces) if placement.sharded_dim is None else torch.cat(pieces, placement.sharded_dim)
            found[f"{kind}/{parameter_name}"] = whole.contiguous()
    batch = rows(0)[ROW]
    with torch.no_grad():
        found["logits"] = model.logits(model.hidden(batch)).contiguous()
    return found


def main() -> None:
    out, *names = sys.argv[1:]
    torch.set_num_threads(1)
    topology = build_topology(ParallelConfig(int(os.environ["WORLD_SIZE"])), "gloo")
    for name in names:
        result = gathered(name, topology)
        if topology.rank == 0:
            save_file(result, Path(out) / f"{name}.safetensors")
    if topology.rank == 0:
        state = run(case_config("mqa"), Topology.serial())[0].state_dict()
        divided = Gemini(case_config("mqa"), LAYOUT, Layers(topology)).state_dict()
        (Path(out) / "names.json").write_text(json.dumps([sorted(state), sorted(divided)]))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
