"""Roles of an objective, and the arithmetic of what reads memories, from specs alone and against built modules."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_gemini.config.run import RunConfig
from megatron_gemini.kernels.attention.plan import plan_cross_attention
from megatron_gemini.kernels.attention.reference import attend_densely
from megatron_gemini.models.stage import DecoderStage, parts
from megatron_gemini.parallel.parameters import initialize
from megatron_gemini.parallel.tensor.layers import LayerFactory
from megatron_gemini.parallel.topology import Topology
from megatron_gemini.planning.job import Job
from megatron_gemini.planning.memory import MEDIA, rank_footprint
from megatron_gemini.planning.report import report
from megatron_gemini.planning.search import judge
from megatron_gemini.planning.step_time import model_flops, rank_flops, reader_flops
from megatron_gemini.planning.zero_state import zero_state
from tests.extension.reading import READING
from tests.unit.planning import toys
from tests.unit.planning.jobs import machine
from tests.unit.planning.test_activations import LAYOUT
from tests.unit.planning.test_extensions import MODEL, count, run_of

PREFERRED = {"kind": "preferred"}
WIDTH = MODEL["width"]


@pytest.fixture(autouse=True)
def plugin() -> Iterator[None]:
    with toys.registered():
        yield


def job_of(world: int = 2, objective: dict | None = None, connector: str = "halve", **sections) -> Job:
    sections = {"parallel": {"pipeline": 2}} | sections
    return Job(run_of(connector, objective=objective or PREFERRED, **sections), world, LAYOUT.size)


def built(config: RunConfig, stages: int) -> list[int]:
    """Parameters of the stages of a decoder as they are made."""
    with torch.device("meta"):
        layers = LayerFactory(Topology.serial())
        return [count(DecoderStage(config, LAYOUT, layers, part)) for part in parts(config, LAYOUT, stages)]


@pytest.mark.parametrize("connector", ["halve", "recall"])
def test_parameters_of_every_role_are_those_of_its_modules(connector: str) -> None:
    job = job_of(connector=connector)
    found = [{r.size.name: [s.parameters for s in r.stages] for r in job.roles_of(rank)} for rank in range(2)]
    config = dataclasses.replace(job.config, parallel=type(job.config.parallel)())
    first, last = built(config, 2)
    smaller = dataclasses.replace(config.model, layers=2, width=32)
    (whole,) = built(dataclasses.replace(config, model=smaller), 1)
    assert found == [
        {"reference": [first], "critic": [first]},
        {"reference": [last], "critic": [last + WIDTH], "reward": [whole + 32], "value": [7]},
    ]


def test_a_report_names_every_role_with_its_size() -> None:
    text = report([judge(job_of(), machine())], 1)
    whole = Job(job_of(parallel={}).config, 1, LAYOUT.size).roles_of(0)[0].stages[0].parameters
    assert (
        re.search(r", reference (\d\.\d+) B, reward .* B, critic .* B, value 0\.000 B;", text)[1]
        == f"{whole / 1e9:.3f}"
    )
    assert "reference" not in report([judge(job_of(objective={"kind": "quiet"}), machine())], 1)


@pytest.mark.parametrize("virtual", [1, 2])
def test_virtual_stages_of_a_role_lie_where_those_of_the_policy_lie(virtual: int) -> None:
    many = {"pipeline": 2, "virtual_stages": virtual, "schedule": "breadth_first"}
    job = job_of(parallel=many, model={**MODEL, "layers": 5})
    for rank in range(2):
        reference, *_ = job.roles_of(rank)
        assert reference.stages == job.stages_of(rank)


def test_each_role_is_kept_at_its_zero_stage() -> None:
    """Of two ranks that hold the same weights, in float32."""
    engine = {"zero_stage": 0, "offload_optimizer": "none"}
    with_roles, plain = (
        rank_footprint(job_of(2, objective, parallel={}, engine=engine), 0)
        for objective in (PREFERRED, {"kind": "quiet"})
    )
    job = job_of(2, parallel={}, engine=engine)
    reference, reward, critic, value = (role.stages[0] for role in job.roles_of(0))
    # A frozen one is divided under ZeRO-3, and whole under the policy's stage 0. Trained ones are as any engine.
    plan = dataclasses.replace(job.zero, stage=2)
    trained = zero_state(critic.parameters, critic.largest, plan)
    trained += zero_state(value.parameters, value.largest, dataclasses.replace(plan, stage=1))
    for part in ("weights", "gradients", "optimizer"):
        frozen = 4 * (reference.parameters / 2 + reward.parameters) if part == "weights" else 0
        more = getattr(with_roles.gpu, part) - getattr(plain.gpu, part)
        assert more == pytest.approx(frozen + getattr(trained.gpu, part)), part


def test_weights_of_a_frozen_role_lie_on_the_host_where_those_of_zero_3_do() -> None:
    offloaded = {"engine": {"zero_stage": 3, "offload_optimizer": "cpu", "offload_parameters": "cpu"}}
    here = rank_footprint(job_of(2, parallel={}, **offloaded), 0)
    without = rank_footprint(job_of(2, {"kind": "quiet"}, parallel={}, **offloaded), 0)
    reference, reward, critic, value = (role.stages[0].parameters for role in job_of(2, parallel={}).roles_of(0))
    # Those of ZeRO-1 and 2, which moves no weights, stay on the GPU.
    assert here.gpu.weights - without.gpu.weights == pytest.approx(4 * (critic + value))
    assert here.host.weights - without.host.weights == pytest.approx(4 * (reference + reward) / 2)


def test_a_pass_of_a_role_keeps_what_the_policys_does_and_they_follow_each_other() -> None:
    """So roles of the policy's sizes add no activations, and neither do the layers of a frozen one."""
    copies, plain = (
        rank_footprint(job_of(1, objective, parallel={}), 0).gpu.activations
        for objective in (PREFERRED, {"kind": "quiet"})
    )
    quiet = toys.QUIET.loss_bytes(None, job_of().config.model, 256, 4)
    assert copies == pytest.approx(plain - quiet)  # whose own loss keeps more
    more = job_of(1, {**PREFERRED, "reward_layers": 200}, parallel={})
    assert rank_footprint(more, 0).gpu.activations == copies  # one layer at a time


def test_a_frozen_role_does_a_third_of_the_arithmetic_and_a_trained_one_all() -> None:
    plain = rank_flops(job_of(1, {"kind": "quiet"}, parallel={}), 0)
    job = job_of(1, parallel={}, connector="recall")
    smaller = dataclasses.replace(job.config.model, layers=2, width=32)
    of_reward = rank_flops(Job(dataclasses.replace(run_of(), model=smaller), 1, LAYOUT.size), 0)
    without_readers = job_of(1, parallel={})
    assert rank_flops(without_readers, 0) == pytest.approx(plain * (1 + 1 / 3 + 1) + of_reward / 3)
    assert model_flops(without_readers) == pytest.approx(8 * rank_flops(without_readers, 0))
    assert rank_flops(job, 0) > rank_flops(without_readers, 0)


def reader_counts(reader: torch.nn.Module, tokens: int, memory: int) -> list[int]:
    """FLOPs that torch counts in the forward, and in the backward, of one document that sees all of its memory."""
    initialize(reader, 0)
    segment_M = torch.ones(memory, dtype=torch.int32)
    plan = plan_cross_attention(
        torch.ones(tokens, dtype=torch.int32), segment_M, torch.zeros(memory, dtype=torch.int64)
    )
    h_SD, memory_MD = torch.ones(tokens, WIDTH).requires_grad_(), torch.ones(memory, WIDTH).requires_grad_()
    found = []
    with FlopCounterMode(display=False) as counter:
        out = reader(h_SD, memory_MD, plan)
        found.append(counter.get_total_flops())
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
        found.append(counter.get_total_flops())
    return found


@pytest.mark.parametrize("spec", [READING, toys.RECALL], ids=lambda spec: spec.name)
def test_flops_of_a_reader_are_those_that_torch_counts(spec, monkeypatch) -> None:
    # Dense, since torch knows no count of its flash attention on a CPU.
    monkeypatch.setattr("tests.extension.connector_modules.attention", lambda *inputs: attend_densely(*inputs)[0])
    tokens, memory, section = 96, 32, spec.section()
    model = job_of().config.model
    reader = spec.reads.build(section, model, LayerFactory(Topology.serial()))
    forward, backward = reader_counts(reader, tokens, memory)
    assert spec.reads.flops(section, model, tokens, memory, memory, 1) == forward > 0
    assert backward == 2 * forward  # as the planner counts it


def test_every_reader_before_the_layers_of_a_rank_counts_and_no_other() -> None:
    config = run_of("recall")
    one = toys.RECALL.reads.flops(None, config.model, 256, MEDIA * 256, 0, 1)
    assert [reader_flops(config, layers) for layers in (range(3), range(1, 2), range(2, 3))] == [2 * one, 0, one]
    assert reader_flops(run_of("halve"), range(3)) == 0
    plain, reads = (rank_flops(Job(run_of(kind), 1, LAYOUT.size), 0) for kind in ("halve", "recall"))
    assert reads - plain == pytest.approx(3 * 2 * one)
    context = dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, context=2))
    assert reader_flops(context, range(3)) == one  # its memory is whole on every rank, its tokens are not
