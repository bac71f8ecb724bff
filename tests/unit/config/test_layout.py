"""Legal layouts: every rule with its reason, and what is nearest to a layout that breaks one."""

from __future__ import annotations

import dataclasses
import itertools
import re
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_gemini.config.data import DataConfig, SourceConfig
from megatron_gemini.config.engine import EngineConfig, ParallelConfig
from megatron_gemini.config.layout import VIRTUAL_STAGES, check_layout, data_size, layouts, nearest_layouts, why_not
from megatron_gemini.config.load import load_config
from megatron_gemini.config.model import ModelConfig
from megatron_gemini.config.run import RunConfig
from megatron_gemini.config.training import TrainConfig
from megatron_gemini.objectives.image_tokenizer.spec import ImageTokenizerObjectiveConfig


def config(zero: int = 1, rows: int = 16, tokens: int = 64, lanes: int = 16, **parallel) -> RunConfig:
    return RunConfig(
        model=ModelConfig(heads=8, mlp_width=64, layers=8),
        data=DataConfig(row_tokens=tokens, lanes=lanes),
        engine=EngineConfig(zero_stage=zero, offload_optimizer="none"),
        train=TrainConfig(rows_per_step=rows),
        parallel=ParallelConfig(**parallel),
    )


LEGAL = [
    (1, {}),
    (16, {}),
    (8, {"tensor": 2, "pipeline": 2}),
    (8, {"tensor": 2, "sequence": True, "context": 2}),
    (4, {"pipeline": 4}),
    (8, {"pipeline": 2, "virtual_stages": 2, "schedule": "interleaved"}),
    (8, {"pipeline": 8, "schedule": "breadth_first", "rows": 1, "zero": 3}),
    (2, {"pipeline": 2, "virtual_stages": 4, "schedule": "breadth_first", "rows": 3, "zero": 3}),
    (4, {"pipeline": 2, "zero": 2}),
    (4, {"lanes": 6}),  # any rank may read any lanes
]


@pytest.mark.parametrize(("world", "sizes"), LEGAL)
def test_a_legal_layout_passes(world, sizes):
    check_layout(config(**sizes), world)


ILLEGAL = [
    (3, {"tensor": 3}, "parallel.tensor is 3, which does not divide model.heads (8)"),
    (6, {"tensor": 4}, "parallel.tensor x context x pipeline is 4, which does not divide the 6 ranks"),
    (4, {"rows": 6}, "train.rows_per_step is 6, which 4 data-parallel ranks does not divide"),
    (2, {"sequence": True}, "parallel.sequence divides the tokens over the tensor-parallel ranks, but parallel.tensor"),
    (2, {"tensor": 2, "sequence": True, "tokens": 63}, "data.row_tokens is 63, which parallel.tensor (2)"),
    (2, {"context": 2, "tokens": 66}, "data.row_tokens is 66, which 2 x parallel.context (4 chunks)"),
    (4, {"tensor": 2, "sequence": True, "context": 2, "tokens": 68}, "parallel.tensor x 2 x parallel.context (8)"),
    (2, {"virtual_stages": 2, "schedule": "breadth_first"}, "parallel.virtual_stages is 2, but parallel.pipeline is 1"),
    (16, {"pipeline": 16}, "parallel.pipeline x virtual_stages is 16, but model.layers is 8"),
    (4, {"pipeline": 4, "virtual_stages": 4, "schedule": "interleaved"}, "virtual_stages is 16, but model.layers is 8"),
    (2, {"pipeline": 2, "virtual_stages": 2}, "parallel.schedule 1f1b has one stage a rank, but"),
    (2, {"pipeline": 2, "schedule": "interleaved"}, "interleaved needs parallel.virtual_stages of 2 or more"),
    (8, {"pipeline": 4, "virtual_stages": 2, "schedule": "interleaved", "rows": 12}, "multiples of parallel.pipeline"),
    (4, {"pipeline": 4, "rows": 3}, "parallel.schedule 1f1b keeps a row in each of the 4 stages"),
]


@pytest.mark.parametrize(("world", "sizes", "reason"), ILLEGAL)
def test_an_illegal_layout_is_refused_with_the_reason_and_legal_ones_nearby(world, sizes, reason):
    broken = config(**sizes)
    with pytest.raises(ValueError, match=re.escape(reason)) as refused:
        check_layout(broken, world)
    near = nearest_layouts(broken, world)
    assert all(why_not(other, world) is None for other in near)
    assert bool(near) != ("none, whatever the layout" in str(refused.value))


def test_the_options_of_the_nearest_layout_really_are_the_way_out(tmp_path):
    """What the message says, put behind the same command, makes it legal."""
    arguments = ["--model.heads", "8", "--data.lanes", "16", "--train.rows_per_step", "16", "--parallel.tensor", "16"]
    with pytest.raises(ValueError, match="nearest that 16 ranks can run") as refused:
        check_layout(load_config(arguments), 16)
    offered = str(refused.value).split("can run: ")[1].split("; ")
    assert len(offered) == 3
    for option in offered:
        check_layout(load_config([*arguments, *option.split(" (")[0].split()]), 16)


def test_the_nearest_keeps_the_ranks_of_a_row_and_changes_one_setting():
    near = nearest_layouts(config(pipeline=2, virtual_stages=2), 4)[0]
    assert near.parallel == ParallelConfig(pipeline=2, virtual_stages=2, schedule="interleaved")


def test_key_value_heads_divide_the_tensor_ranks_or_are_divided_by_them():
    def grouped(heads: int) -> RunConfig:
        return dataclasses.replace(config(tensor=4), model=ModelConfig(heads=12, mlp_width=64, kv_heads=heads))

    for heads in (1, 2, 4, 12):
        check_layout(grouped(heads), 4)
    with pytest.raises(ValueError, match=r"parallel.tensor is 4 and model.kv_heads is 6; one must divide the other"):
        check_layout(grouped(6), 4)


def test_validation_rows_count_where_there_is_a_validation_loss():
    validation = DataConfig(lanes=16, row_tokens=64, validation=(SourceConfig(shards="a.tar"),))
    broken = dataclasses.replace(config(), data=validation, train=TrainConfig(rows_per_step=16, validation_rows=6))
    check_layout(broken, 4)
    broken = dataclasses.replace(broken, train=dataclasses.replace(broken.train, validation_every=5))
    with pytest.raises(ValueError, match=r"train.validation_rows is 6, which 4 data-parallel ranks"):
        check_layout(broken, 4)


def test_the_image_tokenizer_is_data_parallel_only():
    objective = ImageTokenizerObjectiveConfig(images_per_step=8)
    task = RunConfig(objective=objective, train=TrainConfig(rows_per_step=3))
    check_layout(task, 8)
    with pytest.raises(
        ValueError, match=r"parallel.tensor is 2; the model of the objective image_tokenizer"
    ) as refused:
        check_layout(dataclasses.replace(task, parallel=ParallelConfig(tensor=2)), 8)
    assert "--parallel.tensor 1 (8 data parallel)" in str(refused.value)
    with pytest.raises(ValueError, match=r"objective.images_per_step is 8, which 3 data-parallel ranks"):
        check_layout(task, 3)


def test_training_refuses_an_illegal_layout_before_torch_is_imported(capsys, monkeypatch):
    code = (
        "import sys; from megatron_gemini import cli; status = cli.main(['train', '--parallel.pipeline', '3'])\n"
        "sys.exit(status if 'torch' not in sys.modules else 99)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 2
    assert "does not divide the 1 ranks of this job" in result.stderr
    assert "--parallel.pipeline 1 (1 data parallel)" in result.stderr


powers = st.sampled_from([1, 2, 3, 4, 6, 8])


@st.composite
def runs(draw) -> RunConfig:
    virtual = draw(st.sampled_from(VIRTUAL_STAGES))
    kv_heads = draw(powers)
    return RunConfig(
        model=ModelConfig(
            heads=kv_heads * draw(powers), kv_heads=kv_heads, mlp_width=48, layers=draw(st.integers(1, 12))
        ),
        data=DataConfig(row_tokens=8 * draw(st.integers(1, 12)), lanes=draw(powers)),
        engine=EngineConfig(zero_stage=draw(st.integers(0, 3)), offload_optimizer="none"),
        train=TrainConfig(rows_per_step=draw(powers)),
        parallel=ParallelConfig(
            tensor=draw(powers),
            sequence=draw(st.booleans()),
            context=draw(st.sampled_from([1, 2, 4])),
            pipeline=draw(powers),
            virtual_stages=virtual,
            schedule=draw(st.sampled_from(["1f1b", "interleaved", "breadth_first"])),
        ),
    )


@settings(max_examples=60, deadline=None)
@given(run=runs(), world=st.sampled_from([1, 2, 3, 4, 6, 8, 12, 16]))
def test_what_is_listed_as_legal_or_near_is_legal_and_ends_with_equal_ranks(run, world):
    near = nearest_layouts(run, world)
    for other in near:
        check_layout(other, world)
        parallel = other.parallel
        assert parallel.tensor * parallel.context * parallel.pipeline * data_size(other, world) == world
    if why_not(run, world) is None:
        assert near[0] == run


@pytest.mark.parametrize(("world", "rows"), [(4, 4), (8, 8), (8, 6), (12, 12)])
def test_every_legal_layout_is_listed(world, rows):
    """Against every combination there is, most of which break a rule."""
    sizes, switches = range(1, world + 1), (False, True)
    every = itertools.product(sizes, switches, sizes, sizes, VIRTUAL_STAGES, ("1f1b", "interleaved", "breadth_first"))
    legal = set()
    for values in every:
        parallel = ParallelConfig(*values)
        if parallel.pipeline == 1 and parallel.schedule != "1f1b":
            continue  # a schedule of nothing
        if why_not(dataclasses.replace(config(rows=rows, lanes=12), parallel=parallel), world) is None:
            legal.add(parallel)
    assert {found.parallel for found in layouts(config(rows=rows, lanes=12), world)} == legal
