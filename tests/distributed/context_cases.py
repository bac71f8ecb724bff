"""One rank of the context-parallel test: the decoder with its loss, from the seed, on rows that cross chunks.

    torchrun --nproc-per-node N -m tests.distributed.context_cases OUT '{"layout": {"context": 2}, ...}'

Rank 0 writes the summed loss and the whole model's gradients of every layout, model and row. It knows nothing of the
serial result. No engine takes part: gradients of weights are summed over the ranks here.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save_file

from megatron_gemini.contracts import Batch
from megatron_gemini.engine.distributed import end_process, leave
from megatron_gemini.models.stage import DecoderStage, StageInput
from megatron_gemini.parallel.parameters import initialize, placement_of
from megatron_gemini.parallel.tensor.layers import LayerFactory
from megatron_gemini.parallel.topology import Topology
from megatron_gemini.training.quiet import quiet_warnings
from tests.attention_rows import row
from tests.distributed.process_groups import groups_left_at_the_end
from tests.distributed.rows import CONFIG, LAYOUT, T, loss_of
from tests.distributed.train_layouts import topology_of

MODELS = {"mqa": {"kv_heads": 1}, "gqa": {"kv_heads": 2, "tie_embeddings": False}}
PADDED = "padded"  # a row whose only document lies on the first rank: the others have nothing to attend to
ROWS = ("spans", "text", PADDED, "random-0", "random-1", "random-2")


def metadata(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """segment_T and span_T."""
    if name == "spans":  # two documents; spans over the borders of 4 and of 8 chunks, adjacent, and at an end
        return row([53, 40], [(3, 14), (20, 27), (27, 51), (53, 60), (61, 93)], 3)
    if name == "text":
        return row([7, 60, 29], [], 0)
    if name == PADDED:
        return row([11], [(2, 5)], T - 11)
    return random_metadata(np.random.default_rng(int(name.split("-")[1])))


def random_metadata(random: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Up to six documents, each with up to three spans."""
    padding = int(random.integers(0, T // 4))
    edges = [0, *np.sort(random.choice(np.arange(1, T - padding), 5, replace=False)).tolist(), T - padding]
    spans = []
    for begin, end in itertools.pairwise(edges):
        cuts = np.sort(random.integers(begin, end + 1, 6)).reshape(3, 2).tolist()
        spans += [(first, last) for first, last in cuts if first < last]
    return row(np.diff(edges).tolist(), spans, padding)


def batch(name: str) -> Batch:
    """A row of random ids; about a third of the targets have no weight."""
    segment, span = metadata(name)
    random = torch.Generator().manual_seed(len(name))
    document = torch.where(segment == 0, len(segment), segment)  # ascending, padding last
    weight = torch.randint(0, 3, (T,), generator=random) * 0.5 * (segment != 0)
    return Batch(
        token_T=torch.randint(0, LAYOUT.size, (T,), generator=random),
        target_T=torch.randint(0, LAYOUT.size, (T,), generator=random),
        weight_T=weight.float(),
        position_T=torch.arange(T) - torch.searchsorted(document, document),
        segment_T=segment,
        span_T=span,
        modality_T=torch.randint(0, 2, (T,), generator=random).to(torch.int8),
    )


def run(model: str, given: Batch, topology: Topology, recompute: Any = "none") -> tuple[DecoderStage, torch.Tensor]:
    """The model after one forward and backward; float32 [5]: loss, weighted nll and weight of both modalities."""
    layers = LayerFactory(topology)
    sizes = dataclasses.replace(CONFIG.model, init_std=0.2, layers=2, **MODELS[model])
    engine = dataclasses.replace(CONFIG.engine, recompute=recompute)
    stage = DecoderStage(dataclasses.replace(CONFIG, model=sizes, engine=engine), LAYOUT, layers, loss=loss_of(CONFIG))
    initialize(stage, seed=7)
    output = stage(row=StageInput(given, None, layers.context_positions(T)))
    output.loss.backward()
    sums = (output.loss.detach()[None], output.sums["nll"], output.sums["weight"])
    return stage, torch.cat(sums)


def whole_gradient(parameter: torch.nn.Parameter, topology: Topology) -> torch.Tensor:
    """Summed over the context ranks, which have the same weights, and put together over the tensor-parallel ones."""
    placement, grad = placement_of(parameter), parameter.grad
    assert grad is not None
    dist.all_reduce(grad, group=topology.shard_group)
    pieces = [torch.empty_like(grad) for _ in range(topology.tensor_size)]
    dist.all_gather(pieces, grad, group=topology.tensor_group)
    if placement.partial:
        return torch.stack(pieces).sum(0)
    if placement.sharded_dim is None:
        return pieces[0]
    return torch.cat(pieces, placement.sharded_dim).narrow(
        placement.sharded_dim, 0, placement.global_shape[placement.sharded_dim]
    )


def result(model: str, given: Batch, topology: Topology, recompute: str) -> dict[str, torch.Tensor]:
    stage, sums = run(model, given, topology, recompute)
    dist.all_reduce(sums, group=topology.context_group)
    grads = {name: whole_gradient(parameter, topology) for name, parameter in stage.named_parameters()}
    return {"sums": sums, **{f"grad/{name}": grad.contiguous() for name, grad in grads.items()}}


def one_layout(layout: str, settings: dict[str, Any], out: Path) -> None:
    topology = topology_of(settings)
    for model in MODELS:
        for name in ROWS:
            found = result(model, batch(name), topology, settings.get("recompute", "none"))
            if topology.rank == 0:
                save_file(found, out / f"{layout}-{model}-{name}.safetensors")


def main() -> None:
    out, layouts = Path(sys.argv[1]), json.loads(sys.argv[2])
    torch.set_num_threads(1)
    quiet_warnings()
    dist.init_process_group("gloo")
    for layout, settings in layouts.items():
        with groups_left_at_the_end():
            one_layout(layout, settings, out)
    leave()


if __name__ == "__main__":
    main()
    end_process()
