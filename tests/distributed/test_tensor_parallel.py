"""Tensor and sequence parallelism equal the serial model: both start from the seed, nothing is copied between them.

On 2 ranks the single key/value head is replicated, two and four are divided; on 4 ranks two heads are replicated and
every rank reads one of them, and four are divided.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_gemini.parallel.parameters import placement_of
from megatron_gemini.parallel.topology import Topology
from tests.distributed.rows import CONFIG, LAYOUT
from tests.distributed.tensor_cases import CASES, media_gradient, run
from tests.ranks import run_ranks

RANKS = [2, pytest.param(4, marks=pytest.mark.long)]
each_case = pytest.mark.parametrize("name", CASES)
with_and_without = pytest.mark.parametrize("sequence", [False, True], ids=["tensor", "sequence"])


@pytest.fixture(scope="module", params=RANKS, ids=lambda ranks: f"{ranks} ranks")
def results(request, tmp_path_factory):
    """(ranks, folder of what they gathered); one launch for all cases."""
    out = tmp_path_factory.mktemp("tensor")
    ended = run_ranks("tests.distributed.tensor_cases", request.param, out, *CASES, log=out / "log")
    assert ended.status == 0, ended.output
    assert "FutureWarning" not in ended.output, ended.output
    return request.param, out


@pytest.fixture(scope="module")
def serial():
    return {name: run(name, Topology.serial()) for name in CASES}


def found_of(results, name, sequence):
    """(tensors, the partial flag of every parameter that is not sharded)."""
    path = results[1] / f"{name}-{sequence}"
    return load_file(f"{path}.safetensors"), json.loads(Path(f"{path}.json").read_text())


def assert_close(found, wanted, name):
    torch.testing.assert_close(
        found, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max() + 1), msg=lambda m: f"{name}: {m}"
    )


@with_and_without
@each_case
def test_loss_weights_and_every_gradient_equal_the_serial_model(results, serial, name, sequence):
    found, partial = found_of(results, name, sequence)
    model, loss, _ = serial[name]
    torch.testing.assert_close(found["loss"], loss, rtol=1e-5, atol=1e-5)
    parameters = dict(model.named_parameters())
    assert {n.partition("/")[2] for n in found if "/" in n} == set(parameters)
    assert parameters["layers.0.attention.input.key_value"].grad.abs().max() > 1e-3
    for parameter_name, parameter in parameters.items():
        weight, grad = (found[f"{kind}/{parameter_name}"] for kind in ("weight", "grad"))
        if parameter_name in partial:  # every rank's copy is the whole
            assert (weight == weight[:1]).all() and torch.equal(weight[0], parameter.detach())
            assert_close(grad.sum(0) if partial[parameter_name] else grad[0], parameter.grad, parameter_name)
        else:
            kept = len(parameter)
            assert torch.equal(weight[:kept], parameter.detach())
            assert (weight[kept:] == 0).all() and (grad[kept:] == 0).all()
            assert_close(grad[:kept], parameter.grad, parameter_name)


@with_and_without
@each_case
def test_the_partial_parameters_are_those_whose_ranks_see_other_tokens_or_heads(results, serial, name, sequence):
    _, partial = found_of(results, name, sequence)
    ranks, kv_heads = results[0], CASES[name].get("kv_heads", CONFIG.model.kv_heads)
    parts = {"query_norm.weight", "key_norm.weight"}
    parts |= {"input.key_value"} if kv_heads % ranks else set()
    parts |= {"input.norm", "mlp.norm", "norm.weight"} if sequence else set()
    wanted = {n for n in dict(serial[name][0].named_parameters()) if n in parts or n.split(".", 3)[-1] in parts}
    wanted |= {f"layers.{i}.mlp.norm" for i in range(CONFIG.model.layers)} if sequence else set()
    assert {n for n, is_partial in partial.items() if is_partial} == wanted


@with_and_without
@each_case
def test_gradients_that_are_not_summed_are_the_same_on_every_rank(results, name, sequence):
    """Bit for bit: otherwise the copies of a weight drift apart over a run. Partial gradients differ."""
    found, partial = found_of(results, name, sequence)
    assert ("norm.weight" in partial) and partial["norm.weight"] == sequence
    for parameter_name, is_partial in partial.items():
        grad = found[f"grad/{parameter_name}"]
        assert (grad == grad[:1]).all() != is_partial, parameter_name


@with_and_without
@each_case
def test_the_gradient_of_media_is_whole_on_the_rank_that_holds_their_tokens(results, serial, name, sequence):
    grads = found_of(results, name, sequence)[0]["media"]
    wanted = media_gradient(serial[name][0])
    if sequence:
        assert ((grads != 0).any(-1).sum(0) == 1).all()
        assert_close(grads.sum(0), wanted, "media")
    else:
        assert (grads == grads[:1]).all()
        assert_close(grads[0], wanted, "media")


@with_and_without
@each_case
def test_logits_of_the_whole_vocabulary_are_gathered_without_padding(results, serial, name, sequence):
    found = found_of(results, name, sequence)[0]["logits"]
    assert found.shape[-1] == LAYOUT.size
    torch.testing.assert_close(found, serial[name][2], rtol=1e-4, atol=1e-4)


def test_state_dicts_have_the_same_names_whatever_the_layout(results):
    serial_names, divided = json.loads((results[1] / "names.json").read_text())
    assert serial_names == divided


def test_a_serial_parameter_is_whole(serial):
    for parameter in serial["mqa"][0].parameters():
        placement = placement_of(parameter)
        assert placement.sharded_dim is None and placement.global_shape == tuple(parameter.shape)
        assert not placement.partial
