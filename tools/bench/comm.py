"""Bytes that tensor- and context-parallel ranks send in forward and backward, against the formula and megatron-core.

    python tools/bench/comm.py                                  # 4 gloo ranks on this machine, float32
    python tools/bench/comm.py --ranks 2 --kv_heads 2 --precision bf16

Starts its own ranks. Every collective is seen at torch's dispatcher, whoever calls it, and counted as a ring sends it:
an all-reduce of n bytes 2 (p - 1) / p n from each of p ranks, an all-gather or a reduce-scatter (p - 1) / p n with n
the whole tensor. Two gloo ranks do some all-reduces by a send of n bytes each, which is as much. megatron-core's rows
are its own SelfAttention module on the same shapes; it runs on a CPU once told that the current CUDA device is "cpu"
and that dropout needs no random state. Ends with status 1 if a count is not what the formula says. The loss is left
out: a few bytes a token for the softmax over a divided vocabulary.

The last lines are the bytes that a decoder layer keeps for its backward, without its parameters.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_gemini.config.engine import ParallelConfig
from megatron_gemini.config.model import ModelConfig
from megatron_gemini.engine.distributed import end_process, leave
from megatron_gemini.kernels.attention.api import AttentionPlan, plan_attention
from megatron_gemini.kernels.rope import CosSin, rope_cos_sin
from megatron_gemini.models.decoder import Attention, DecoderLayer
from megatron_gemini.parallel.parameters import initialize, placement_of
from megatron_gemini.parallel.tensor.heads import HeadShard
from megatron_gemini.parallel.tensor.layers import LayerFactory
from megatron_gemini.parallel.topology import Topology, build_topology
from megatron_gemini.training.quiet import quiet_warnings

Nested: TypeAlias = "torch.Tensor | Sequence[Nested]"
GATHERS = ("_allgather_base_", "allgather_into_tensor_coalesced_", "allgather_")
SCATTERS = ("_reduce_scatter_base_", "reduce_scatter_tensor_coalesced_", "reduce_scatter_")


class Sent(TorchDispatchMode):
    """Counts the collectives of what runs inside it, and the bytes that this rank sends for them."""

    def __init__(self, ranks: int) -> None:
        super().__init__()
        self.ranks, self.bytes, self.calls = ranks, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.calls += 1
            self.bytes += self.ring_bytes(func.__name__.split(".")[0], args)
        return func(*args, **(kwargs or {}))

    def ring_bytes(self, name: str, args: Sequence[Nested]) -> int:
        if name == "recv_":
            return 0
        if name == "send":
            return sum(t.numel() * t.element_size() for t in _flat(args[0]))
        if name == "allreduce_":
            share, whole = 2, args[0]
        elif name in GATHERS:
            share, whole = 1, args[0]  # the output
        elif name in SCATTERS:
            share, whole = 1, args[1]  # the input
        else:
            raise ValueError(f"a collective that this benchmark does not know: {name}")
        return share * (self.ranks - 1) * sum(t.numel() * t.element_size() for t in _flat(whole)) // self.ranks


def _flat(tensors: Nested) -> Iterator[torch.Tensor]:
    if isinstance(tensors, torch.Tensor):
        yield tensors
    else:
        for tensor in tensors:
            yield from _flat(tensor)


class _SumKeyValueGradient(torch.autograd.Function):
    """What was done before: the gradients of all replicated keys and values summed where they enter attention."""

    @staticmethod
    def forward(
        ctx: Any, k: torch.Tensor, v: torch.Tensor, shard: HeadShard, held: int, group: Any
    ) -> tuple[torch.Tensor, ...]:
        ctx.shard, ctx.held, ctx.group = shard, held, group
        return k.view_as(k), v.view_as(v)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        tokens, read, width = grads[0].shape
        every = grads[0].new_zeros(2, tokens, ctx.held, width)
        mine = every.narrow(2, ctx.shard.first, read)
        mine.copy_(torch.stack(grads))
        dist.all_reduce(every, group=ctx.group)
        return *mine.unbind(0), None, None, None


@dataclasses.dataclass(frozen=True)
class Case:
    """Shapes of one decoder layer on one rank's topology. Bytes in units of what a ring sends of a whole tensor."""

    tokens: int
    model: ModelConfig
    topology: Topology

    @property
    def layers(self) -> LayerFactory:
        return LayerFactory(self.topology)

    @property
    def whole_keys(self) -> bool:
        return self.model.kv_heads % self.topology.tensor_size != 0

    def once(self, width: int) -> int:
        """A ring's bytes for an all-gather or reduce-scatter of [T, width]."""
        ranks, size = self.topology.world, torch.get_default_dtype().itemsize
        return (ranks - 1) * self.tokens * width * size // ranks

    @property
    def row(self) -> int:
        return self.once(self.model.width)

    @property
    def keys(self) -> int:
        return self.once(2 * self.model.kv_heads * self.model.head_width)

    def stream(self) -> torch.Tensor:
        return torch.randn(len(self.layers.stream(self.tokens)), self.model.width, requires_grad=True)


def cos_sin_and_plan(case: Case) -> tuple[CosSin, AttentionPlan]:
    """Of one document as long as the row."""
    ones = torch.ones(case.tokens, dtype=torch.int32)
    cos_sin = rope_cos_sin(torch.arange(case.tokens), case.model.head_width, 10_000.0, torch.get_default_dtype())
    return cos_sin, plan_attention(ones, ones * 0, case.layers.context_positions(case.tokens))


def attention(case: Case, sum_gradient: bool = False) -> Callable[[], torch.Tensor]:
    """Forward of this package's attention block; sum_gradient: as it was before."""
    module = Attention(case.model, case.layers, 0)
    initialize(module, 0)
    cos_sin, plan = cos_sin_and_plan(case)
    h_SD = case.stream()
    if sum_gradient:
        how = (module.input.shard, case.model.kv_heads, case.topology.tensor_group)
        module.input.register_forward_hook(lambda *x: (x[-1][0], *_SumKeyValueGradient.apply(*x[-1][1:], *how)))
    return lambda: module(h_SD, cos_sin, plan, None)


def mlp(case: Case) -> Callable[[], torch.Tensor]:
    model = case.model
    module = case.layers.mlp(model.width, model.mlp_width, "gelu", eps=1e-6, std=0.02, last_std=0.02)
    initialize(module, 0)
    h_SD = case.stream()
    return lambda: module(h_SD)


def ends(case: Case) -> Callable[[], torch.Tensor]:
    """Embedding and the product with the head."""
    module = case.layers.embedding(1000, case.model.width, std=0.02)
    initialize(module, 0)
    token = torch.arange(case.tokens) % 1000
    return lambda: module(case.layers.gather_stream(module(token)), as_head=True)


def megatron_attention(case: Case) -> Callable[[], torch.Tensor]:
    """Forward of megatron-core's SelfAttention with an explicit causal mask; [T, 1, D]."""
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer import dot_product_attention
    from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    class NoDropout:
        def fork(self) -> contextlib.AbstractContextManager[None]:
            return contextlib.nullcontext()

    dot_product_attention.tensor_parallel.get_cuda_rng_tracker = NoDropout
    torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment, return-value]
    model = case.model
    parts = SelfAttentionSubmodules(
        linear_qkv=ColumnParallelLinear,
        core_attention=dot_product_attention.DotProductAttention,
        linear_proj=RowParallelLinear,
    )
    with warnings.catch_warnings(action="ignore"):
        config = TransformerConfig(
            num_layers=1,
            hidden_size=model.width,
            num_attention_heads=model.heads,
            num_query_groups=model.kv_heads,
            kv_channels=model.head_width,
            tensor_model_parallel_size=case.topology.tensor_size,
            sequence_parallel=case.topology.sequence,
            params_dtype=torch.get_default_dtype(),
            add_bias_linear=False,
            attention_dropout=0.0,
            hidden_dropout=0.0,
            use_cpu_initialization=True,
            gradient_accumulation_fusion=False,
            masked_softmax_fusion=False,
        )
        module = SelfAttention(config, parts, layer_number=1, attn_mask_type=AttnMaskType.arbitrary)
    h_S1D = case.stream().unsqueeze(1)
    hidden = torch.ones(case.tokens, case.tokens, dtype=torch.bool).triu(1)[None, None]
    return lambda: module(h_S1D, hidden)[0]


def count(forward: Callable[[], torch.Tensor], ranks: int) -> tuple[int, int]:
    """(bytes sent, collectives) of forward and backward."""
    with Sent(ranks) as sent, warnings.catch_warnings(action="ignore"):  # megatron-core's are about GPUs
        forward().sum().backward()
    return sent.bytes, sent.calls


def count_step(case: Case, module: nn.Module) -> tuple[int, int, int]:
    """(bytes, collectives, formula) of summing a layer's partial gradients: once a step, in float32, without ZeRO."""
    partial = [torch.zeros(p.numel(), dtype=torch.float32) for p in module.parameters() if placement_of(p).partial]
    with Sent(case.topology.tensor_size) as sent:
        dist.all_reduce(torch.cat(partial), group=case.topology.tensor_group)
    model, ranks = case.model, case.topology.tensor_size
    elements = 2 * model.kv_heads * model.head_width * model.width * case.whole_keys
    elements += 2 * model.head_width + 2 * model.width * case.topology.sequence
    return sent.bytes, sent.calls, 2 * (ranks - 1) * elements * 4 // ranks


def kept(case: Case) -> int:
    """Bytes of a decoder layer's saved tensors, every storage once."""
    module = DecoderLayer(case.model, case.layers, 0)
    initialize(module, 0)
    weights = {p.untyped_storage().data_ptr() for p in module.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        module(case.stream(), *cos_sin_and_plan(case), None)
        return sum(storage.nbytes() for storage in storages.values())


def layouts(plain: Case) -> dict[str, Case]:
    """The same ranks in each."""
    here = plain.topology
    sequence = dataclasses.replace(here, sequence=True)
    context = Topology(
        here.world, here.rank, context_size=here.world, context_rank=here.rank, context_group=here.tensor_group
    )
    topologies = {"tensor": here, "sequence": sequence, "context": context}
    return {name: dataclasses.replace(plain, topology=topology) for name, topology in topologies.items()}


def measure(plain: Case) -> list[tuple[str, str, int, int, int]]:
    """(what, layout, collectives, bytes counted, bytes by formula), the same on every rank."""
    plain, sequence, context = layouts(plain).values()
    model, ranks = plain.model, plain.topology.world
    row, keys = plain.row, plain.keys * plain.whole_keys
    mixed = plain.once((model.heads + 2 * model.kv_heads) * model.head_width) * (model.kv_heads < ranks)
    wanted: list[tuple[str, str, Callable[[], torch.Tensor], int]] = [
        ("attention", "tensor", attention(plain), 4 * row),
        ("attention", "tensor, dK/dV summed in the layer", attention(plain, sum_gradient=True), 4 * row + 2 * keys),
        ("attention", "tensor, megatron-core", megatron_attention(plain), 4 * row + 2 * mixed),
        ("attention", "sequence", attention(sequence), 5 * row + 2 * keys),
        ("attention", "sequence, megatron-core", megatron_attention(sequence), 5 * row + 2 * mixed),
        ("attention", "context", attention(context), 2 * plain.keys),
        ("MLP", "tensor", mlp(plain), 4 * row),
        ("MLP", "sequence", mlp(sequence), 5 * row),
        ("MLP", "context", mlp(context), 0),
        ("embedding and head", "tensor", ends(plain), 4 * row),
        ("embedding and head", "sequence", ends(sequence), 4 * row),
    ]
    if not plain.whole_keys:
        del wanted[1]  # nothing was summed there
    rows = []
    for what, layout, forward, formula in wanted:
        sent, calls = count(forward, ranks)
        rows.append((what, layout, calls, sent, formula))
    for case, layout in ((plain, "tensor"), (sequence, "sequence")):
        sent, calls, formula = count_step(case, DecoderLayer(case.model, case.layers, 0))
        rows.append(("once a step, a layer", layout, calls, sent, formula))
    return rows


def show(rows: list[tuple[str, str, int, int, int]]) -> bool:
    """Print the table; whether every count is the formula's."""
    print(f"{'part':<22}{'layout':<36}{'collectives':>11}{'bytes sent':>14}{'formula':>14}")
    for what, layout, calls, sent, formula in rows:
        mark = "" if sent == formula else "  DIFFERS"
        print(f"{what:<22}{layout:<36}{calls:>11}{sent:>14,}{formula:>14,}{mark}")
    return all(sent == formula for *_, sent, formula in rows)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4, help="ranks of each layout (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=512, help="tokens of a row (default: %(default)s)")
    parser.add_argument("--width", type=int, default=256, help="model width (default: %(default)s)")
    parser.add_argument("--heads", type=int, default=8, help="query heads (default: %(default)s)")
    parser.add_argument("--kv_heads", type=int, default=1, help="key/value heads (default: %(default)s)")
    parser.add_argument("--head_width", type=int, default=32, help="width of a head (default: %(default)s)")
    parser.add_argument("--mlp_width", type=int, default=1024, help="inner width of the MLP (default: %(default)s)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = parser.parse_args(arguments)
    if "RANK" not in os.environ:
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(options.ranks), __file__]
        environment = {"OMP_NUM_THREADS": "1", **os.environ}
        return subprocess.run([sys.executable, *launch, *arguments], env=environment).returncode
    quiet_warnings()
    torch.set_default_dtype(torch.bfloat16 if options.precision == "bf16" else torch.float32)
    sizes = {name: getattr(options, name) for name in ("width", "heads", "kv_heads", "head_width", "mlp_width")}
    topology = build_topology(ParallelConfig(tensor=options.ranks), "gloo")
    case = Case(options.tokens, ModelConfig(layers=1, **sizes), topology)
    rows = measure(case)
    right = show(rows) if topology.rank == 0 else True
    for layout, placed in layouts(case).items():
        size = kept(placed)
        if topology.rank == 0:
            print(f"{'a layer keeps':<22}{layout:<36}{'':>11}{size:>14,}")
    leave()
    return 0 if right else 1


if __name__ == "__main__":
    end_process(main())
