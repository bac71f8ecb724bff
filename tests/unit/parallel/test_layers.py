"""Which heads a tensor-parallel rank holds and reads, and what a serial process imports."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_gemini.config.engine import ParallelConfig
from megatron_gemini.parallel.collectives import TensorRanks
from megatron_gemini.parallel.tensor.heads import HeadShard
from megatron_gemini.parallel.topology import Topology, build_topology

ROOT = Path(__file__).parents[3]


def shards(ranks, query, key):
    return [HeadShard.of(query, key, ranks, rank) for rank in range(ranks)]


@pytest.mark.parametrize(
    ("ranks", "query", "key"), [(1, 4, 1), (2, 4, 1), (2, 4, 2), (4, 8, 2), (2, 8, 4), (4, 4, 4), (8, 8, 1), (8, 16, 4)]
)
def test_every_query_head_reads_the_key_head_that_serial_attention_gives_it(ranks, query, key):
    for rank, shard in enumerate(shards(ranks, query, key)):
        assert shard.query == query // ranks
        first_held = 0 if shard.whole else rank * shard.key
        for local in range(shard.query):
            serial = (rank * shard.query + local) // (query // key)
            assert first_held + shard.first + local // (shard.query // shard.key) == serial


def test_key_heads_are_whole_on_every_rank_only_where_there_are_too_few_to_divide():
    assert all(shard.whole for shard in shards(2, 4, 1) + shards(4, 8, 2))
    assert not any(shard.whole for shard in shards(2, 4, 2) + shards(2, 8, 4) + shards(1, 4, 1))


def test_one_tensor_rank_of_a_larger_world_is_the_same_as_one_process():
    assert TensorRanks.of(Topology(world=4, rank=2, sequence=True, data_size=4)) == TensorRanks()


@pytest.mark.parametrize("world", [None, "1"], ids=["no launcher", "a launcher's world of one"])
def test_one_process_is_serial(monkeypatch, world):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if world:
        monkeypatch.setenv("WORLD_SIZE", world)
    assert build_topology(ParallelConfig(), "gloo") == Topology.serial()


def test_more_tensor_ranks_than_processes_is_an_error(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(ValueError, match=r"pipeline is 2, which does not divide the 1 ranks"):
        build_topology(ParallelConfig(tensor=2), "gloo")


def test_one_rank_builds_a_model_and_runs_it_both_ways_without_megatron_core_and_deepspeed():
    """Both take seconds to import. The model has encoders, and its layers are recomputed."""
    code = (
        "import dataclasses, sys\n"
        "from megatron_gemini.models.gemini import Gemini\n"
        "from megatron_gemini.parallel.parameters import initialize\n"
        "from megatron_gemini.parallel.tensor.layers import LayerFactory\n"
        "from megatron_gemini.parallel.topology import build_topology\n"
        "from tests.distributed.rows import CONFIG, LAYOUT, loss_of, rows\n"
        "config = dataclasses.replace(CONFIG, engine=dataclasses.replace(CONFIG.engine, recompute='full'))\n"
        "model = Gemini(config, LAYOUT, LayerFactory(build_topology(config.parallel, 'gloo')), loss_of(config))\n"
        "initialize(model, seed=1)\n"
        "model(rows(0)[0]).loss.backward()\n"
        "assert all(parameter.grad.isfinite().all() for parameter in model.parameters())\n"
        "print(sorted({'megatron', 'megatron.core', 'deepspeed'} & set(sys.modules)))"
    )
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "PYTHONPATH": str(ROOT)}  # as a launcher says it
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | alone, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stdout + done.stderr
