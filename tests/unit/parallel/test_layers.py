"""Which heads a tensor-parallel rank holds and reads, and what a serial process imports."""

from __future__ import annotations

import subprocess
import sys

import pytest

from megatron_gemini.config.engine import ParallelConfig
from megatron_gemini.parallel.tensor.heads import HeadShard
from megatron_gemini.parallel.topology import Topology, build_topology


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


def test_one_process_is_serial(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert build_topology(ParallelConfig(), "gloo") == Topology.serial()


def test_more_tensor_ranks_than_processes_is_an_error(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(ValueError, match=r"pipeline is 2, which does not divide the 1 ranks"):
        build_topology(ParallelConfig(tensor=2), "gloo")


def test_a_serial_model_imports_neither_megatron_nor_deepspeed():
    code = (
        "import sys\n"
        "from megatron_gemini.models.gemini import Gemini\n"
        "from megatron_gemini.config.run import RunConfig\n"
        "from megatron_gemini.contracts import TokenLayout\n"
        "from megatron_gemini.parallel.tensor.layers import LayerFactory\n"
        "from megatron_gemini.parallel.topology import Topology\n"
        "Gemini(RunConfig(), TokenLayout(20, 4), LayerFactory(Topology.serial()))\n"
        "sys.exit(any(name.split('.')[0] in ('megatron', 'deepspeed') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
