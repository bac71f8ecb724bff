"""What is relied on of DeepSpeed and torch is named when a release no longer has it."""

from __future__ import annotations

import types

import pytest
import torch
from torch.distributed import pipelining

from megatron_gemini.engine.internals import gathering, release
from megatron_gemini.engine.pipeline import Pipeline
from megatron_gemini.parallel.topology import Topology


def engine_with(**attributes: object) -> types.SimpleNamespace:
    optimizer = types.SimpleNamespace(**attributes)
    return types.SimpleNamespace(optimizer=optimizer, zero_optimization_stage=lambda: 3)


def test_what_an_optimizer_lacks_is_named():
    there = dict.fromkeys(release._RELIED_ON[3])
    release.check(engine_with(**there))
    del there["grad_position"]
    with pytest.raises(RuntimeError, match=r"deepspeed .* has no SimpleNamespace.grad_position.* checked with 0.19"):
        release.check(engine_with(**there))


def test_a_consistency_check_that_is_gone_is_named(monkeypatch):
    from deepspeed.runtime.zero import stage3

    monkeypatch.delattr(stage3, "assert_ints_same_as_other_ranks")
    with pytest.raises(RuntimeError, match=r"no deepspeed.runtime.zero.stage3.assert_ints_same_as_other_ranks"):
        gathering.install()


def test_a_method_of_torchs_stage_that_is_gone_is_named(monkeypatch):
    Pipeline([], Topology.serial(), "1f1b", torch.empty(0))
    with monkeypatch.context() as patch:
        patch.setattr(pipelining, "PipelineStage", type("PipelineStage", (), {}))
        with pytest.raises(RuntimeError, match=r"torch .* has no PipelineStage._get_recv_ops"):
            Pipeline([], Topology.serial(), "1f1b", torch.empty(0))
    monkeypatch.setattr(pipelining.stage, "_RecvInfo", type("_RecvInfo", (), {}))
    with pytest.raises(RuntimeError, match=r"torch .* has no pipelining.stage._RecvInfo.is_root_arg"):
        Pipeline([], Topology.serial(), "1f1b", torch.empty(0))


def test_differences_between_ranks_are_those_of_order_and_not_of_numbering():
    with gathering.within(None):
        gathering.same_on_all_ranks([3, 4, 9])  # alone there is nobody to differ from
