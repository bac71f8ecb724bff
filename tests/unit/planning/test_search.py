"""The search: everything that it lists is legal, nothing legal and better is left out, and what it prefers."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_gemini.config.data import DataConfig
from megatron_gemini.config.engine import EngineConfig, ParallelConfig
from megatron_gemini.config.layout import check_layout, layouts
from megatron_gemini.config.load import config_from_dict
from megatron_gemini.config.model import ModelConfig
from megatron_gemini.config.run import RunConfig
from megatron_gemini.config.training import TrainConfig
from megatron_gemini.models.presets import preset
from megatron_gemini.planning.job import Job
from megatron_gemini.planning.memory import USABLE
from megatron_gemini.planning.search import alternatives, candidates, judge, search
from megatron_gemini.planning.step_time import model_flops
from tests.unit.planning.jobs import VOCABULARY, job, machine


def large(name: str = "8b", rows: int = 128, **sections) -> RunConfig:
    values = preset(name) | {
        "data": {"row_tokens": 4096, "lanes": rows},
        "train": {"rows_per_step": rows},
        "engine": {"precision": "bf16"},
    }
    return config_from_dict(values | sections)


@st.composite
def runs(draw) -> RunConfig:
    small = st.sampled_from([1, 2, 4, 6, 8])
    return RunConfig(
        model=ModelConfig(heads=draw(small), mlp_width=48, layers=draw(st.integers(1, 9))),
        data=DataConfig(row_tokens=8 * draw(st.integers(1, 4096)), lanes=draw(small)),
        engine=EngineConfig(precision=draw(st.sampled_from(["bf16", "fp32"])), zero_stage=draw(st.integers(1, 3))),
        train=TrainConfig(rows_per_step=draw(small)),
        parallel=ParallelConfig(context=draw(st.sampled_from([1, 2]))),
    )


@settings(max_examples=15, deadline=None)
@given(run=runs(), world=st.sampled_from([1, 2, 4, 6, 8]))
def test_whatever_is_listed_is_legal_and_a_line_for_every_layout(run, world):
    try:
        plans = search(run, world, VOCABULARY, machine())
    except ValueError as error:
        assert "no layout of" in str(error)
        assert not list(layouts(run, world))
        return
    for plan in plans:
        check_layout(plan.job.config, world)
    listed = [plan.job.config.parallel for plan in plans]
    assert len(set(listed)) == len(listed)
    legal = {one.parallel for one in layouts(run, world)}
    without = {parallel for parallel in legal if parallel.context == 1}
    long_rows = run.parallel.context > 1 or run.data.row_tokens >= 16_384
    assert set(listed) == (legal if long_rows or not without else without)


def test_the_best_is_the_best_of_all_candidates_that_fit():
    config, small = large(rows=4), machine(gpu_memory=40e9)
    every = [judge(Job(candidate, 4, VOCABULARY), small) for candidate in candidates(config, 4)]
    best = search(config, 4, VOCABULARY, small)[0]
    assert best.rank == min(plan.rank for plan in every)
    assert best.fits and best.footprint.gpu.total <= USABLE * 40e9
    assert any(not plan.fits for plan in every)


def test_what_does_not_fit_comes_last_and_says_by_how_much():
    plans = search(large(rows=8), 8, 72_208, machine(gpu_memory=12e9))
    assert [plan.fits for plan in plans] == sorted((plan.fits for plan in plans), reverse=True)
    last = plans[-1]
    assert last.lacks_gpu > 0
    assert last.lacks_gpu == pytest.approx(last.footprint.gpu.total - USABLE * 12e9)


def test_a_host_that_is_too_small_is_a_shortage_too():
    plan = judge(job(8, engine={"offload_optimizer": "cpu"}), machine(host_memory=1e9))
    assert not plan.fits and plan.lacks_gpu == 0
    assert plan.lacks_host == pytest.approx(plan.host - 1e9)
    two_hosts = judge(job(8, engine={"offload_optimizer": "cpu"}), machine(host_memory=1e9, gpus_per_node=4))
    assert two_hosts.host == pytest.approx(plan.host / 2)


def test_more_memory_never_makes_the_best_slower():
    config = large(rows=4)
    best = [search(config, 4, 72_208, machine(gpu_memory=size))[0] for size in (40e9, 80e9, 140e9)]
    assert [plan.fits for plan in best] == [True] * 3
    slowest_first = [plan.time.total for plan in best]
    assert slowest_first == sorted(slowest_first, reverse=True)


def test_zero3_in_a_pipeline_is_chosen_only_where_nothing_else_is_nearly_as_fast():
    """Among fitting plans of one layout: the chosen one, against the fastest below ZeRO-3."""
    config = large(rows=16)
    pipelines = [p for p in search(config, 8, 72_208, machine()) if p.fits and p.job.config.parallel.pipeline > 1]
    assert {plan.job.zero.stage for plan in pipelines} >= {1, 3}
    every = list(candidates(config, 8))
    for plan in (plan for plan in pipelines if plan.job.zero.stage == 3):
        lower = [c for c in every if c.parallel == plan.job.config.parallel and c.engine.zero_stage < 3]
        plans = [judge(dataclasses.replace(plan.job, config=c), machine()) for c in lower]
        assert all(plan.time.total * 1.05 < other.time.total for other in plans if other.fits)


def test_alternatives_change_one_choice_each():
    best = search(large(rows=4), 4, 72_208, machine())[0]
    words = [change for change, _ in alternatives(best)]
    assert "engine.zero_stage 1" in words and "engine.recompute full" in words
    assert all(other.job.config.parallel == best.job.config.parallel for _, other in alternatives(best))


def test_a_users_zero_stage_of_the_encoders_is_kept():
    config = large(encoder_engines={"zero_stage": 0})
    assert {c.encoder_engines.zero_stage for c in candidates(config, 8)} == {0}
    assert {c.encoder_engines.zero_stage for c in candidates(large(), 8)} == {-1, 3}


def test_zero0_is_no_choice_in_bf16_where_it_sums_gradients_in_bf16():
    assert {c.engine.zero_stage for c in candidates(large(rows=4), 4)} == {1, 2, 3}
    single = large(rows=4, engine={"precision": "fp32"})
    assert {c.engine.zero_stage for c in candidates(single, 4)} == {0, 1, 2, 3}


def test_zero3_pays_its_hooks_where_a_microbatch_is_too_small_to_hide_them():
    small, sharded = judge(job(2), machine()), judge(job(2, engine={"zero_stage": 3}), machine())
    assert sharded.time.zero > 2 * small.time.zero
    wide = Job(large(rows=8, engine={"precision": "bf16", "zero_stage": 3}), 8, 72_208)
    assert judge(wide, machine()).time.zero < 0.02 * judge(wide, machine()).time.total


def test_the_time_is_bounded_by_the_arithmetic_at_the_assumed_share_of_the_peak():
    for plan in search(large(rows=4), 4, 72_208, machine())[:20]:
        assert plan.mfu <= 0.5 + 1e-9
        flops = model_flops(plan.job)
        assert plan.rows_per_second * flops / 4 == pytest.approx(plan.mfu * 4 * 989e12)


def test_the_bubble_is_the_schedules():
    plain = judge(job(4, rows=8, pipeline=4), machine())
    assert plain.time.bubble_share == pytest.approx(3 / (8 + 3))
    interleaved = judge(job(4, rows=8, pipeline=4, virtual_stages=2, schedule="interleaved"), machine())
    assert interleaved.time.bubble_share == pytest.approx(3 / (8 * 2 + 3))
    assert judge(job(4), machine()).time.bubble_share == 0
