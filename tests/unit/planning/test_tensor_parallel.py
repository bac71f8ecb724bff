"""Tensor- and context-parallel layers: bytes kept and bytes sent by formula against what really is saved and sent.

The collectives are those of a process group that does nothing, so that one process is one rank of several: what is
saved and sent does not depend on the values.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_gemini.config.data import DataConfig
from megatron_gemini.config.engine import EngineConfig, ParallelConfig
from megatron_gemini.config.model import ImageTokenizerConfig, ModelConfig
from megatron_gemini.config.run import RunConfig
from megatron_gemini.contracts import TokenLayout
from megatron_gemini.models.heads import NextTokenLoss
from megatron_gemini.models.stage import DecoderStage, LossOutput, StageInput
from megatron_gemini.parallel.parameters import initialize
from megatron_gemini.parallel.tensor.layers import LayerFactory
from megatron_gemini.parallel.topology import Topology
from megatron_gemini.planning.activations import RowShare, layer_saved, loss_saved
from megatron_gemini.planning.job import Job
from megatron_gemini.planning.parameters import stages, vocabulary_parameters
from megatron_gemini.planning.traffic import traffic
from tests.unit.planning.test_activations import T, row, saved_bytes

RANKS = 4
LAYOUT = TokenLayout(200, (("image", 40),))
MODELS = {
    "one key head": ModelConfig(width=64, layers=3, heads=8, kv_heads=1, head_width=16, mlp_width=192),
    "a key head a rank": ModelConfig(width=64, layers=3, heads=8, kv_heads=4, head_width=16, mlp_width=192),
}
LAYOUTS = {
    "tensor": ParallelConfig(tensor=4),
    "sequence": ParallelConfig(tensor=4, sequence=True),
    "context": ParallelConfig(context=4),
    "context and sequence": ParallelConfig(tensor=2, sequence=True, context=2),
}


@pytest.fixture(scope="module")
def groups() -> Iterator[dict[int, dist.ProcessGroup]]:
    """A group of every size, in a world of which only rank 0 exists."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=RANKS)
    yield {1: dist.new_group([0]), 2: dist.new_group([0, 1]), 4: dist.new_group(list(range(RANKS)))}
    dist.destroy_process_group()


def topology_of(parallel: ParallelConfig, groups: dict[int, dist.ProcessGroup]) -> Topology:
    return Topology(
        world=RANKS,
        tensor_size=parallel.tensor,
        tensor_group=groups[parallel.tensor],
        sequence=parallel.sequence,
        context_size=parallel.context,
        context_group=groups[parallel.context],
        shard_size=parallel.context,
        shard_group=groups[parallel.context],
    )


def run_of(model: ModelConfig, parallel: ParallelConfig, recompute: str = "none") -> RunConfig:
    return RunConfig(
        model=model,
        data=DataConfig(row_tokens=T),
        image_tokenizer=ImageTokenizerConfig(codes=len(LAYOUT.code_range("image"))),
        parallel=parallel,
        engine=EngineConfig(precision="fp32", zero_stage=1, offload_optimizer="none", recompute=recompute),
    )


def built(config: RunConfig, groups: dict[int, dist.ProcessGroup]) -> DecoderStage:
    layers = LayerFactory(topology_of(config.parallel, groups))
    stage = DecoderStage(config, LAYOUT, layers, loss=NextTokenLoss(len(LAYOUT.targets), z_loss=1e-4))
    initialize(stage, 0)
    return stage


def through(stage: DecoderStage) -> LossOutput:
    """The loss of this rank's tokens of a row of four documents, or where the row is divided of one.

    A context rank keeps the keys of the documents that it has queries of, at most those of the whole row, as planned.
    """
    lengths = (100, 30, 90, 36) if stage.config.parallel.context == 1 else (T,)
    return stage(row=StageInput(row(lengths), own_C=stage.layers.context_positions(T)))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MODELS)
def test_a_rank_keeps_what_the_formula_says(name, layout, groups):
    config = run_of(MODELS[name], LAYOUTS[layout])
    stage = built(config, groups)
    assert sum(parameter.numel() for parameter in stage.parameters()) == stages(config, LAYOUT.size)[0].parameters
    found = saved_bytes(stage, lambda: through(stage))
    share = RowShare.of(config, packed=config.parallel.context == 1)
    rows = vocabulary_parameters(config.model, LAYOUT.size, share.tensor) // config.model.width
    predicted = config.model.layers * layer_saved(config.model, share, "none")
    predicted += loss_saved(config.model, rows, share, deferred=False)
    assert predicted == pytest.approx(found, rel=0.05)


def tensors(nested: torch.Tensor | list) -> list[torch.Tensor]:
    """Collectives take a tensor, a list of them, or one for each rank in a list of lists."""
    return [nested] if isinstance(nested, torch.Tensor) else [t for part in nested for t in tensors(part)]


class Sent(TorchDispatchMode):
    """Bytes that a rank sends as a ring does: its share of the whole tensor, of an all-reduce twice."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0.0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        if func.namespace == "c10d":
            reduce = name == "allreduce_"
            whole = tensors(args[1] if name.startswith("_reduce_scatter") else args[0])
            group = next(
                arg for arg in args if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type())
            )
            size = dist.ProcessGroup.unbox(group).size()
            self.bytes += (2 if reduce else 1) * (size - 1) / size * sum(t.numel() * t.element_size() for t in whole)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MODELS)
def test_a_microbatch_sends_what_the_formula_says(name, layout, recompute, groups):
    """Every layer and both ends. What the loss exchanges, a few bytes a token, is not in the formula."""
    config = run_of(MODELS[name], LAYOUTS[layout], recompute)
    stage = built(config, groups)
    with Sent() as sent:
        through(stage).loss.backward()
    planned = traffic(Job(config, RANKS, LAYOUT.size), 0)
    assert planned.tensor + planned.context == pytest.approx(sent.bytes, rel=0.05)
    alone = dataclasses.replace(config, parallel=ParallelConfig())
    assert traffic(Job(alone, 1, LAYOUT.size), 0).total(16) == 0
