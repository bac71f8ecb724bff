"""One long row over context-parallel ranks against one process: what is kept for the backward, and the work of a rank.

    python tools/bench/long_row.py                              # 32,768 tokens on 4 gloo ranks of this machine
    python tools/bench/long_row.py --ranks 2 --tokens 8192 --heads 4

Starts its own ranks. The row is one document with a bidirectional span in its middle, the most work that attention can
have; the layers are the decoder's, without embedding and head. Bytes kept are those of the tensors that autograd saves,
parameters left out, every storage once. CPU seconds are a process's, for one forward and backward; rank 0 also runs the
whole row by itself. Ends with status 1 if its output is not that of the ranks, to 1e-4 of its largest value.

Shape suffixes: T tokens of the row, C those of a context rank, D model width.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_gemini.config.engine import ParallelConfig
from megatron_gemini.config.model import ModelConfig
from megatron_gemini.engine.distributed import end_process, leave
from megatron_gemini.kernels.attention.api import plan_attention
from megatron_gemini.models.decoder import Decoder, Part
from megatron_gemini.parallel.parameters import initialize
from megatron_gemini.parallel.tensor.layers import LayerFactory
from megatron_gemini.parallel.topology import Topology, build_topology
from megatron_gemini.training.quiet import quiet_warnings


@dataclass(frozen=True)
class Cost:
    """Of one forward and backward: bytes kept in between, CPU and wall seconds."""

    kept: int
    cpu: float
    wall: float


class Kept:
    """Inside it, counts the bytes of what autograd saves, every storage once."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.ignored = {p.untyped_storage().data_ptr() for p in module.parameters()}
        self.storages: dict[int, torch.UntypedStorage] = {}
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor)

    def _keep(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.ignored:
            self.storages[storage.data_ptr()] = storage
        return tensor

    def take(self) -> int:
        """The bytes; lets go of the storages."""
        count = sum(storage.nbytes() for storage in self.storages.values())
        self.storages.clear()
        return count


def run(model: ModelConfig, tokens: int, topology: Topology) -> tuple[torch.Tensor, Cost]:
    """Hidden states of this rank's tokens after the layers, and what they cost."""
    layers = LayerFactory(topology)
    decoder = Decoder(model, 1, layers, Part(range(model.layers), first=False, last=False))
    initialize(decoder, seed=0)
    own_C = layers.context_positions(tokens)
    h_TD = torch.randn(tokens, model.width, generator=torch.Generator().manual_seed(1))
    h_CD = (h_TD if own_C is None else h_TD.index_select(0, own_C)).requires_grad_()
    segment_T, span_T = torch.ones(tokens, dtype=torch.int32), torch.zeros(tokens, dtype=torch.int32)
    span_T[tokens // 2 - tokens // 64 : tokens // 2 + tokens // 64] = 1
    cpu, wall = time.process_time(), time.perf_counter()
    kept = Kept(decoder)
    with kept.hooks:
        out_CD = decoder(h_CD, torch.arange(tokens), plan_attention(segment_T, span_T, own_C))
    count = kept.take()
    out_CD.square().mean().backward()
    return out_CD.detach(), Cost(count, time.process_time() - cpu, time.perf_counter() - wall)


def compare(model: ModelConfig, tokens: int, topology: Topology) -> bool:
    """Run on all ranks, then on rank 0 alone; print the table. Whether the outputs are the same."""
    out_CD, cost = run(model, tokens, topology)
    costs: list[Cost | None] = [None] * topology.world
    dist.all_gather_object(costs, cost)
    if topology.rank:
        return True
    whole_TD, alone = run(model, tokens, Topology.serial())
    print(f"{'':<16}{'kept, bytes':>16}{'of one process':>16}{'CPU s':>10}{'wall s':>10}")
    for name, of in (("one process", alone), *((f"context rank {rank}", each) for rank, each in enumerate(costs))):
        assert of is not None
        print(f"{name:<16}{of.kept:>16,}{of.kept / alone.kept:>16.3f}{of.cpu:>10.1f}{of.wall:>10.1f}")
    keys = model.layers * tokens * 2 * model.kv_heads * model.head_width * out_CD.itemsize
    print(f"{'keys and values':<16}{keys:>16,}{keys / alone.kept:>16.3f}  of the whole row, within each of the above")
    own_C = LayerFactory(topology).context_positions(tokens)
    wanted_CD = whole_TD if own_C is None else whole_TD.index_select(0, own_C)
    worst = float((out_CD - wanted_CD).abs().max() / wanted_CD.abs().max())
    print(f"outputs differ by {worst:.1e} of the largest")
    return worst <= 1e-4


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4, help="context-parallel ranks (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=32768, help="tokens of the row (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=2, help="decoder layers (default: %(default)s)")
    parser.add_argument("--width", type=int, default=128, help="model width (default: %(default)s)")
    parser.add_argument("--heads", type=int, default=2, help="query heads (default: %(default)s)")
    parser.add_argument("--kv_heads", type=int, default=1, help="key/value heads (default: %(default)s)")
    parser.add_argument("--head_width", type=int, default=32, help="width of a head (default: %(default)s)")
    parser.add_argument("--mlp_width", type=int, default=512, help="inner width of the MLP (default: %(default)s)")
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = parser.parse_args(arguments)
    if "RANK" not in os.environ:
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(options.ranks), __file__]
        environment = {"OMP_NUM_THREADS": "1", **os.environ}
        return subprocess.run([sys.executable, *launch, *arguments], env=environment).returncode
    quiet_warnings()
    names = ("layers", "width", "heads", "kv_heads", "head_width", "mlp_width")
    topology = build_topology(ParallelConfig(context=options.ranks), "gloo")
    model = ModelConfig(**{name: getattr(options, name) for name in names}, init_std=0.2)  # attention far from uniform
    same = compare(model, options.tokens, topology)
    leave()
    return 0 if same else 1


if __name__ == "__main__":
    end_process(main())
