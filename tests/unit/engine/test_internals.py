"""What is relied on of DeepSpeed and torch is named when a release no longer has it, and its wrappers do the same.

All in one file, since DeepSpeed joins a process group once in a process.
"""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn
from torch.distributed import pipelining

from megatron_gemini.engine.internals import gathering, kinds, release, types
from megatron_gemini.engine.pipeline import Pipeline
from megatron_gemini.parallel.topology import Topology
from tests.unit.engine.tiny_engines import KINDS, alone_in_the_world, engine_of

CLASSES = [one for one in vars(types).values() if inspect.isclass(one) and one.__module__ == types.__name__]
# Nothing of these is there at the start; their attributes are checked at DeepSpeed's classes, in `release.MODULES`.
LATER = (types.GatherHandle, types.ParameterStatus)
LISTED = [(one, name) for one in CLASSES if one not in LATER for name in release.members(one)]
TRAINED = [kind for kind in KINDS if kind != "frozen"]
LR = 0.1
IN_MODULES = [(module, name) for module, names in release.MODULES.items() for name in names]


@pytest.fixture(scope="module")
def engines():
    """An engine of every kind by name."""
    with alone_in_the_world():
        yield {kind: engine_of(kind) for kind in KINDS}


def check(kind, engine):
    """As at the start of an engine."""
    return (
        release.require(kinds.frozen_uses(engine.deepspeed)) if kind == "frozen" else kinds.wrapper_of(engine.deepspeed)
    )


def uses(kind, engine):
    wrapper = None if kind == "frozen" else engine.wrapper
    return list(kinds.frozen_uses(engine.deepspeed) if wrapper is None else wrapper.uses(engine.deepspeed))


@pytest.mark.parametrize(("listed", "name"), LISTED, ids=lambda value: getattr(value, "__name__", value))
def test_what_an_object_of_deepspeed_lacks_is_named(engines, monkeypatch, listed, name):
    concerned = [kind for kind, engine in engines.items() if any(use.listed is listed for use in uses(kind, engine))]
    assert concerned or listed is types.CallableEngine
    for kind in concerned:
        lacking = [use.thing for use in uses(kind, engines[kind]) if use.listed is listed]
        with monkeypatch.context() as patch:

            def has(thing, asked, lacking=lacking):
                return hasattr(thing, asked) and not (asked == name and any(thing is one for one in lacking))

            patch.setattr(release, "hasattr", has, raising=False)
            with pytest.raises(RuntimeError, match=rf"deepspeed .* has no \w+\.{name}, .* checked with 0.19"):
                check(kind, engines[kind])


def test_a_frozen_engine_lists_what_gathers_its_weights(engines):
    listed = {use.listed for use in uses("frozen", engines["frozen"])}
    assert listed >= {types.ParameterOffload, types.HookHandle, types.PartitionedParameter}


@pytest.mark.parametrize(("module", "name"), IN_MODULES)
@pytest.mark.parametrize("kind", ["plain", "stage 3", "frozen"])
def test_what_a_module_of_deepspeed_lacks_is_named(engines, monkeypatch, kind, module, name):
    def get(thing, asked):
        if asked == name.split(".")[-1] and getattr(thing, "__name__", "") in (module, name.split(".")[0]):
            raise AttributeError(asked)
        return getattr(thing, asked)

    monkeypatch.setattr(release, "getattr", get, raising=False)
    with pytest.raises(RuntimeError, match=f"has no {module}.{name}, on which"):
        check(kind, engines[kind])


def test_an_optimizer_of_another_class_is_named(engines, monkeypatch):
    monkeypatch.delitem(kinds.KINDS, "BF16_Optimizer")
    with pytest.raises(RuntimeError, match="but a BF16_Optimizer"):
        check("bf16", engines["bf16"])


@pytest.mark.parametrize("kind", KINDS)
def test_an_engine_that_lacks_nothing_passes(engines, kind):
    check(kind, engines[kind])


def test_a_consistency_check_that_is_gone_is_named(monkeypatch):
    from deepspeed.runtime.zero import stage3

    monkeypatch.delattr(stage3, "assert_ints_same_as_other_ranks")
    with pytest.raises(RuntimeError, match=r"no deepspeed.runtime.zero.stage3.assert_ints_same_as_other_ranks"):
        gathering.install()


def test_an_engine_that_is_not_ours_gets_deepspeeds_own_check(engines, monkeypatch):
    import deepspeed
    from deepspeed.runtime.zero import utils

    asked, own = [], utils.assert_ints_same_as_other_ranks
    monkeypatch.setattr(utils, "assert_ints_same_as_other_ranks", lambda numbers: (asked.append(numbers), own(numbers)))
    monkeypatch.setenv("LOCAL_RANK", "0")
    module, settings = nn.Linear(4, 4), {"train_batch_size": 1, "zero_optimization": {"stage": 3}}
    adam = torch.optim.AdamW(module.parameters())
    theirs, *_ = deepspeed.initialize(model=module, optimizer=adam, config=settings)
    for _ in range(2):
        theirs.backward(theirs(torch.ones(1, 4)).sum())
    assert asked
    asked.clear()
    ours = engines["stage 3, offloaded"]
    for _ in range(2):
        ours.backward(ours.forward(torch.ones(1, 8)), boundary=True)
    assert not asked


def test_the_check_of_our_own_engines_knows_order_and_not_numbering():
    with gathering.within(None):
        gathering.same_on_all_ranks([3, 4, 9])  # alone there is nobody to differ from


def step(engine, value, norm):
    """One step on an input of `value`."""
    engine.backward(engine.forward(torch.full((2, 8), value, dtype=engine.dtype)), boundary=True)
    engine.wait()
    engine.step(LR, torch.tensor(norm))


def masters(engine):
    found = {piece.name: piece.master().clone() for piece in engine.fragments}
    engine.wrapper.put_back()
    return found


@pytest.mark.parametrize("kind", TRAINED)
@pytest.mark.usefixtures("engines")  # and their process group
def test_a_skipped_step_changes_no_weight_and_no_later_step(kind):
    plain, interrupted = engine_of(kind), engine_of(kind)
    begun = masters(plain)
    step(interrupted, float("nan"), float("nan"))
    assert all(torch.equal(value, begun[name]) for name, value in masters(interrupted).items())
    for _ in range(2):
        step(plain, 1.0, 2.0)
        step(interrupted, 1.0, 2.0)
    after = masters(plain)
    assert not any(torch.equal(value, begun[name]) for name, value in after.items())
    assert all(torch.equal(value, after[name]) for name, value in masters(interrupted).items())


@pytest.mark.parametrize("kind", TRAINED)
@pytest.mark.usefixtures("engines")
def test_gradients_are_clipped_by_the_norm_that_is_given(kind):
    """Adam's first step is the same for gradients of any size, but its moments are not."""
    small, large = engine_of(kind), engine_of(kind)
    bound = small.config.engine.gradient_clipping
    step(small, 1.0, bound / 2)
    step(large, 1.0, bound * 4)
    for one, other in zip(small.fragments, large.fragments, strict=True):
        torch.testing.assert_close(other.moment("exp_avg") * 4, one.moment("exp_avg"), rtol=1e-5, atol=1e-9)


def test_a_method_of_torchs_stage_that_is_gone_is_named(monkeypatch):
    Pipeline([], Topology.serial(), "1f1b", torch.empty(0))
    with monkeypatch.context() as patch:
        patch.setattr(pipelining, "PipelineStage", type("PipelineStage", (), {}))
        with pytest.raises(RuntimeError, match=r"torch .* has no PipelineStage._get_recv_ops"):
            Pipeline([], Topology.serial(), "1f1b", torch.empty(0))
    monkeypatch.setattr(pipelining.stage, "_RecvInfo", type("_RecvInfo", (), {}))
    with pytest.raises(RuntimeError, match=r"torch .* has no pipelining.stage._RecvInfo.is_root_arg"):
        Pipeline([], Topology.serial(), "1f1b", torch.empty(0))
