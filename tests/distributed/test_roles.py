"""An engine with several roles: a policy, a frozen reference at another ZeRO stage, a value model of its own loss.

The oracle is a plain loop in torch over the same rows, of which it shares the modules and the initial values.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from megatron_gemini.checkpoint.inference import fill
from megatron_gemini.checkpoint.piece import WEIGHT
from megatron_gemini.checkpoint.pieces import PieceReader
from megatron_gemini.models.gemini import Gemini
from megatron_gemini.parallel.parameters import initialize
from megatron_gemini.parallel.tensor.layers import LayerFactory
from megatron_gemini.parallel.topology import Topology
from tests.distributed.role_cases import LR, PIPELINES, ROWS, STEPS, TINY, Policy, T, Value, Words, tiny_rows
from tests.distributed.rows import LAYOUT, with_layout
from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("roles")
    ended = run_ranks("tests.distributed.role_cases", 2, folder, log=folder / "log")
    assert ended.status == 0, ended.output
    return folder


def found(out: Path, case: str) -> list[dict]:
    """What each rank found."""
    return [json.loads((out / f"found-{rank}.json").read_text())[case] for rank in range(2)]


def tensors(directory: Path, role: str = "") -> dict[str, torch.Tensor]:
    reader = PieceReader(directory, role)
    return {name: reader.read(WEIGHT, name) for name in reader.names()}


def begun(module: nn.Module) -> nn.Module:
    initialize(module, TINY.train.seed)
    return module


@pytest.fixture(scope="module")
def oracle() -> tuple[list[float], list[dict[str, torch.Tensor]], list[dict[str, torch.Tensor]]]:
    """([norm] a step, the policy's gradients, the value model's)."""
    policy, value, reference = begun(Policy()), begun(Value()), begun(Words())
    adams = []
    for module, rate in ((policy, LR), (value, LR / 2)):
        named = dict(module.named_parameters())
        decays = {name: TINY.optimizer.weight_decay if "embedding" not in name else 0.0 for name in named}
        groups = [{"params": [named[name]], "weight_decay": decay} for name, decay in decays.items()]
        adams.append(torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), eps=TINY.optimizer.eps))
    norms, gradients = [], []
    for step in range(STEPS):
        for adam in adams:
            adam.zero_grad()
        for row in tiny_rows(step):
            with torch.no_grad():
                log_p = reference(row)
            (policy(row._replace(reference_T=log_p)).loss / (ROWS * T)).backward()
            (value(row).loss / (ROWS * T)).backward()
        gradients.append([{n: p.grad.clone() for n, p in module.named_parameters()} for module in (policy, value)])
        parameters = [*policy.parameters(), *value.parameters()]
        norms.append(nn.utils.clip_grad_norm_(parameters, TINY.engine.gradient_clipping).item())
        for adam in adams:
            adam.step()
    return norms, [policies for policies, _ in gradients], [values for _, values in gradients]


@pytest.mark.parametrize("step", range(STEPS))
def test_gradients_of_every_trained_role_are_those_of_plain_torch(out, oracle, step):
    for role, expected in (("", oracle[1][step]), ("value", oracle[2][step])):
        gradients = tensors(out / "tiny" / f"gradients-{step}", role)
        assert gradients.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(gradients[name], gradient, rtol=0, atol=1e-5 * float(gradient.abs().max()))


def test_the_reference_has_no_gradient_and_counts_in_no_norm(out, oracle):
    for result in found(out, "tiny"):
        torch.testing.assert_close(torch.tensor(result["norms"]), torch.tensor(oracle[0]), rtol=1e-5, atol=0)
    with pytest.raises(ValueError, match="nothing of the role reference"):
        PieceReader(out / "tiny" / "gradients-0", "reference")


def test_the_reference_keeps_every_bit_while_the_others_move(out):
    initial = dict(begun(Words()).named_parameters())
    for role, moves in (("reference", False), ("", True), ("value", True)):
        begin, end = tensors(out / "tiny" / "begin", role), tensors(out / "tiny" / "end", role)
        assert all(torch.equal(begin[name], end[name]) != moves for name in begin), role
    assert all(torch.equal(begin, initial[name]) for name, begin in tensors(out / "tiny/begin", "reference").items())


def test_a_resumed_run_goes_on_to_the_bit(out):
    for result in found(out, "tiny"):
        assert result["resumed"] == result["onward"]


def test_a_checkpoint_holds_trained_roles_with_their_moments_and_no_frozen_one(out):
    checkpoint = Path(found(out, "tiny")[0]["checkpoint"])
    assert set(tensors(checkpoint, "value")) == {"of_token"}
    assert PieceReader(checkpoint, "value").read("exp_avg", "of_token").any()
    assert set(PieceReader(checkpoint).names()) == {"embedding", "hidden", "out"}
    with pytest.raises(ValueError, match="nothing of the role reference"):
        PieceReader(checkpoint, "reference")


def test_a_role_can_begin_as_the_policy_of_a_checkpoint(out):
    checkpoint = tensors(Path(found(out, "tiny")[0]["checkpoint"]))
    loaded = tensors(out / "tiny" / "from a checkpoint", "reference")
    assert all(torch.equal(loaded[name], weight) for name, weight in checkpoint.items())
    for result in found(out, "tiny"):
        (line,) = result["told"]
        assert line.startswith("initialized the role reference (")


def test_going_on_against_another_reference_is_an_error(out):
    for result in found(out, "tiny"):
        message = result["another reference"]
        assert "the role reference is the initial values of seed 3, here it is a checkpoint whose" in message


@pytest.mark.parametrize("case", PIPELINES)
def test_a_reference_runs_through_the_policys_own_layout(out, case):
    """Both begin as the same model, so before the first update their losses are equal."""
    results = [result for result in found(out, case) if result["last"]]
    assert results and all(not result["policy"] for result in found(out, case) if not result["last"])
    for result in results:
        before, during, after = result["reference"]
        assert result["policy"] == before == during
        assert after[1] == before[1]  # has text only: what the other rows get of the encoders has changed


@pytest.mark.parametrize("case", PIPELINES)
def test_a_divided_reference_keeps_every_bit(out, case):
    begin, end = tensors(out / case / "begin", "reference"), tensors(out / case / "end", "reference")
    assert begin and all(torch.equal(end[name], weight) for name, weight in begin.items())


@pytest.mark.parametrize("case", PIPELINES)
def test_a_checkpoint_holds_a_frozen_role_if_asked(out, case):
    """Whole, whatever the layout; and for everybody else it is a checkpoint of the policy."""
    config, checkpoint = with_layout(**PIPELINES[case]), Path(found(out, case)[0]["checkpoint"])
    model = Gemini(config, LAYOUT, LayerFactory(Topology.serial()))
    initialize(model, config.train.seed)
    expected = {n: p for n, p in model.named_parameters() if n.startswith("decoder.")}
    saved = tensors(checkpoint, "reference")
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], weight) for name, weight in expected.items())
    fill(model, PieceReader(checkpoint), checkpoint)


@pytest.mark.parametrize("case", PIPELINES)
def test_a_head_lies_beside_the_policys_last_stage_alone(out, case):
    begin, end = (tensors(out / case / name, "score")["of_token"] for name in ("begin", "end"))
    assert not torch.equal(begin, end)
    checkpoint = Path(found(out, case)[0]["checkpoint"])
    assert torch.equal(tensors(checkpoint, "score")["of_token"], end)
    assert [result["score"] for result in found(out, case)] == [int(result["last"]) for result in found(out, case)]
