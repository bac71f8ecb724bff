"""Tensor parallelism equals the serial model: both start from the seed, and nothing is copied between them.

On 2 ranks the single key/value head is replicated and two are divided; on 4 ranks two heads are replicated and every
rank reads one of them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_gemini.parallel.parameters import placement_of
from megatron_gemini.parallel.topology import Topology
from tests.distributed.rows import LAYOUT, rows
from tests.distributed.tensor_cases import CASES, ROW, case_config, run

ROOT = Path(__file__).parents[2]
RANKS = [2, pytest.param(4, marks=pytest.mark.long)]


@pytest.fixture(scope="module", params=RANKS, ids=lambda ranks: f"{ranks} ranks")
def results(request, tmp_path_factory):
    """(ranks, folder of what they gathered); one launch for all cases."""
    out = tmp_path_factory.mktemp("tensor")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(request.param)]
    command += ["-m", "tests.distributed.tensor_cases", str(out), *CASES]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
    return request.param, out


@pytest.mark.parametrize("name", CASES)
def test_loss_weights_and_every_gradient_equal_the_serial_model(results, name):
    _, out = results
    found = load_file(out / f"{name}.safetensors")
    model, loss = run(case_config(name), Topology.serial())
    torch.testing.assert_close(found["loss"], loss, rtol=1e-5, atol=1e-5)
    parameters = dict(model.named_parameters())
    assert {n.partition("/")[2] for n in found if "/" in n} == set(parameters)
    assert parameters["decoder.layers.0.attention.input.key_value"].grad.abs().max() > 1e-3
    for parameter_name, parameter in parameters.items():
        weight, grad = (found[f"{kind}/{parameter_name}"] for kind in ("weight", "grad"))
        if weight.dim() > parameter.dim():  # replicated: every rank's copy is the whole
            assert (weight == weight[:1]).all() and torch.equal(weight[0], parameter.detach())
            assert_close(grad[0], parameter.grad, parameter_name)
        else:
            rows_kept = len(parameter) if "embedding" in parameter_name or "head" in parameter_name else len(weight)
            assert torch.equal(weight[:rows_kept], parameter.detach())
            assert (weight[rows_kept:] == 0).all() and (grad[rows_kept:] == 0).all()
            assert_close(grad[:rows_kept], parameter.grad, parameter_name)


def assert_close(found, wanted, name):
    torch.testing.assert_close(
        found, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max() + 1), msg=lambda m: f"{name}: {m}"
    )


@pytest.mark.parametrize("name", CASES)
def test_replicated_gradients_are_the_same_on_every_rank(results, name):
    """Bit for bit: otherwise the copies of a weight drift apart over a run."""
    _, out = results
    found = load_file(out / f"{name}.safetensors")
    parameters = dict(run(case_config(name), Topology.serial())[0].named_parameters())
    replicated = [n for n, p in parameters.items() if found[f"grad/{n}"].dim() > p.dim()]
    assert "decoder.norm.weight" in replicated
    assert ("decoder.layers.0.attention.input.key_value" in replicated) == (placement_is_whole(results, name))
    for parameter_name in replicated:
        grad = found[f"grad/{parameter_name}"]
        assert (grad == grad[:1]).all(), parameter_name


def placement_is_whole(results, name):
    ranks, _ = results
    return bool(case_config(name).model.kv_heads % ranks)


@pytest.mark.parametrize("name", CASES)
def test_logits_of_the_whole_vocabulary_are_gathered_without_padding(results, name):
    _, out = results
    model, _ = run(case_config(name), Topology.serial())
    with torch.no_grad():
        wanted = model.logits(model.hidden(rows(0)[ROW]))
    found = load_file(out / f"{name}.safetensors")["logits"]
    assert found.shape[-1] == LAYOUT.size
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_state_dicts_have_the_same_names_whatever_the_layout(results):
    serial, divided = json.loads((results[1] / "names.json").read_text())
    assert serial == divided


def test_a_serial_parameter_is_whole():
    model, _ = run(case_config("mqa"), Topology.serial())
    for parameter in model.parameters():
        placement = placement_of(parameter)
        assert placement.sharded_dim is None and placement.global_shape == tuple(parameter.shape)
