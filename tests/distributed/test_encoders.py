"""Encoders on all ranks give what serial encoders give, and learn what they learn, whatever the layout.

The oracle is plain torch: all encoders in one module from the same seed, one forward a row and encoder (so other
packing, other numbers of forwards, no dummies), autograd, torch's clipping and AdamW. It shares the encoders' code and
the rule for initial values, and neither load balancing, exchange, DeepSpeed nor recomputation. In one of three steps
nobody has sound.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from megatron_gemini.contracts import Batch
from megatron_gemini.models.encoders import Connectors, Encoders, run_lengths
from megatron_gemini.models.placement import combine
from megatron_gemini.parallel.parameters import initialize
from megatron_gemini.registry import ENCODERS
from tests.distributed.encoder_cases import CASES, LR, PLAIN, STEPS, case_config, pretend_loss, rows_of
from tests.distributed.rows import CONFIG, T
from tests.ranks import run_ranks

Frozen = tuple[tuple[str, ...], tuple[str, ...], tuple[tuple[str, float], ...]]
"""Encoders and connectors that are not trained, and learning rates by the beginning of names."""
ALL = [
    pytest.param(ranks, name, marks=pytest.mark.long if ranks == "4" else ())
    for ranks, cases in CASES.items()
    for name in cases
    if not name.startswith("bf16")
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """By the number of ranks: the folder of what the ranks of one launch wrote."""
    base = tmp_path_factory.mktemp("encoder_engines")

    @functools.cache
    def launch(ranks: str) -> Path:
        out = base / ranks
        out.mkdir()
        ended = run_ranks("tests.distributed.encoder_cases", int(ranks), out, *CASES[ranks], log=out / "log")
        assert ended.status == 0, ended.output
        return out

    return launch


@pytest.fixture
def results(folder: Callable[[str], Path], ranks: str, name: str) -> list[dict[str, torch.Tensor]]:
    """What every rank found in a case."""
    return [load_file(folder(ranks) / f"{name}-{rank}.safetensors") for rank in range(int(ranks))]


def serial(frozen: Frozen) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(what a step gave, by "step/kind/row", the final weights) without any parallelism."""
    model = nn.Module()
    model.encoders, model.connectors = Encoders(CONFIG, ENCODERS).encoders, Connectors(CONFIG, ENCODERS).connectors
    initialize(model, CONFIG.train.seed)
    for modules, names in zip((model.encoders, model.connectors), frozen[:2], strict=True):
        for name in names:
            modules[name].requires_grad_(False)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    trained, decay, scales = list(named.values()), CONFIG.optimizer.weight_decay, dict(frozen[2])
    groups = [
        {
            "params": [p],
            "weight_decay": decay if p.ndim >= 2 else 0.0,
            "lr": LR * scales.get(".".join(n.split(".")[:2]), 1),
        }
        for n, p in named.items()
    ]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), eps=1e-4) if trained else None
    found = {}
    for step in range(STEPS):
        total = torch.zeros(())
        for row, batch in enumerate(rows_of(step)):
            given = combine(batch, {name: embed(model, name, batch) for name in ENCODERS if name in batch.media})
            if given is not None:
                order = given.position_O.argsort()
                found[f"{step}/embeddings/{row}"] = given.e_OD.detach()[order]
                found[f"{step}/positions/{row}"] = given.position_O[order]
            total = total + pretend_loss(given, row, torch.arange(T))
        if optimizer is not None:
            optimizer.zero_grad(set_to_none=False)
            for parameter in trained:  # where a step uses an encoder not at all, its gradient is zero
                parameter.grad = torch.zeros_like(parameter)
            if total.requires_grad:
                total.backward()
            bound = CONFIG.engine.gradient_clipping
            found |= {f"gradients{step}/{n}": p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
            found[f"{step}/norm"] = torch.nn.utils.clip_grad_norm_(trained, bound)
            optimizer.step()
    return found, {name: p.detach() for name, p in model.named_parameters()}


def embed(model: nn.Module, name: str, batch: Batch) -> torch.Tensor:
    """[O, D] of one encoder and its connector."""
    media = batch.media[name]
    length_S = torch.from_numpy(run_lengths(name, media.grid_I3.numpy()))
    return model.connectors[name](model.encoders[name](media), length_S)


def frozen_in(case: dict) -> Frozen:
    return tuple((PLAIN | case)[what] for what in ("frozen", "frozen_connectors", "lr_scales"))


@pytest.fixture(scope="module")
def oracle():
    """`serial` by what is frozen."""
    frozen = {frozen_in(case) for cases in CASES.values() for case in cases.values()}
    return {names: serial(names) for names in frozen}


@pytest.mark.parametrize(("ranks", "name"), ALL)
def test_embeddings_reach_the_streams_as_serial_encoders_give_them(ranks, name, results, oracle):
    expected, _ = oracle[frozen_in(CASES[ranks][name])]
    parallel = case_config(ranks, name).parallel
    copies = 1 if parallel.sequence else parallel.tensor
    for step in range(STEPS):
        for row in range(len(rows_of(step))):
            key = f"{step}/embeddings/{row}"
            pieces = [found for found in results if key in found]
            if key not in expected:
                assert not pieces
                continue
            position = torch.cat([found[f"{step}/positions/{row}"] for found in pieces])
            given = torch.cat([found[key] for found in pieces])
            order = position.argsort(stable=True)
            assert torch.equal(position[order], expected[f"{step}/positions/{row}"].repeat_interleave(copies))
            wanted = expected[key].repeat_interleave(copies, 0)
            torch.testing.assert_close(given[order], wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("ranks", "name"), ALL)
def test_encoders_learn_as_serial_ones_do(ranks, name, results, oracle):
    frozen = frozen_in(CASES[ranks][name])
    expected, weights = oracle[frozen]
    for found in results:
        for step in range(STEPS):
            if sum(map(len, frozen[:2])) < 2 * len(CONFIG.encoders):
                torch.testing.assert_close(found[f"{step}/norm"], expected[f"{step}/norm"], rtol=1e-5, atol=0)
    for key in (key for key in expected if key.startswith("gradients")):
        kind, _, parameter = key.partition("/")
        found = gathered(results, kind, parameter)
        torch.testing.assert_close(
            found, expected[key].view(-1), rtol=1e-5, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}"
        )
    for parameter, wanted in weights.items():
        found = gathered(results, "weights", parameter)
        atol = 1e-2 * LR
        torch.testing.assert_close(found, wanted.view(-1), rtol=0, atol=atol, msg=lambda m, p=parameter: f"{p}: {m}")


def gathered(ranks: list[dict[str, torch.Tensor]], kind: str, parameter: str) -> torch.Tensor:
    """A parameter, flat, from the pieces for which the ranks answer."""
    pieces = {}
    for found in ranks:
        for key in found:
            if key.startswith(f"{kind}/") and key.split("/", 2)[2] == parameter:
                start = int(key.split("/")[1])
                assert start not in pieces, f"two ranks answer for {parameter}"
                pieces[start] = found[key]
    return torch.cat([pieces[start] for start in sorted(pieces)])


def test_the_bound_binds_on_most_steps(oracle):
    norms = [float(oracle[(), (), ()][0][f"{step}/norm"]) for step in range(STEPS)]
    assert sum(norm > CONFIG.engine.gradient_clipping for norm in norms) > STEPS // 2, norms


@pytest.mark.parametrize(("ranks", "name"), ALL)
def test_work_is_spread_over_all_ranks(ranks, name, results):
    """Nine items on at most four ranks; every rank reports the same balance."""
    for step in range(STEPS):
        balances = [float(found[f"{step}/balance"]) for found in results]
        assert len(set(balances)) == 1 and 1.0 <= balances[0] < 2.0


@pytest.mark.parametrize("name", CASES["1"])
def test_dummies_add_exact_zeros(name, folder):
    found = load_file(folder("1") / f"{name}-0-dummies.safetensors")
    names = {key.partition("/")[2] for key in found}
    assert len(names) * 2 == len(found) > 20
    for parameter in names:
        assert torch.equal(found[f"1/{parameter}"], found[f"3/{parameter}"]), parameter


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_weights_are_gathered_once_for_all_forwards_of_a_step(direction, folder):
    for rank in range(2):
        found = load_file(folder("2") / f"gathers-{rank}.safetensors")
        assert found[f"{direction}/2"] == found[f"{direction}/4"] == 1


@pytest.mark.long
@pytest.mark.parametrize("name", CASES["4"])
def test_ranks_that_would_run_different_steps_end_with_one_message(name, folder):
    """In a collective that all take part in: nobody waits for a timeout."""
    told = [json.loads((folder("4") / f"{name}-{rank}.json").read_text()) for rank in range(4)]
    assert all(each == told[0] for each in told)
    assert "rank 2 has 3 microbatches, all others 4" in told[0]["microbatches"]
    assert "rank 2 has the encoders vision, all others vision, audio" in told[0]["encoders"]
    assert told[0]["problem"] == "rank 2: sample x cannot be read"
    assert "rank 2: another configuration than all others" in told[0]["settings"]
    assert "rank 2: other shards in data.sources than all others" in told[0]["shards"]
    assert told[0]["same setup"] == "None"
    assert told[0]["readers"] == [0, 1, -1, 3]
    sizes = case_config("4", name).parallel
    data = 4 // (sizes.tensor * sizes.pipeline * sizes.context)
    assert told[0]["nothing"] == f"({float(data)}, 0)"
    assert ("other rows than" in told[0]["rows"]) == (data < 4), told[0]["rows"]


@pytest.mark.parametrize("name", ["bf16-zero-1", "bf16-zero-3"])
def test_bf16_embeddings_and_gradients_are_near_those_of_float32(name, folder, oracle):
    """In the first step. One rounding is off by up to 2^-9 of a value, and there are some tens of them on the way."""
    expected, _ = oracle[frozen_in(CASES["2"][name])]
    results = [load_file(folder("2") / f"{name}-{rank}.safetensors") for rank in range(2)]
    for found in results:
        for row in range(len(rows_of(0))):
            if (key := f"0/embeddings/{row}") in found:
                order = found[f"0/positions/{row}"].argsort()
                assert found[key].dtype == torch.bfloat16
                assert relative_error(found[key][order], expected[key]) < 2**-6
    gradients = [key for key in expected if key.startswith("gradients0")]
    assert len(gradients) > 10
    for key in gradients:
        assert relative_error(gathered(results, *key.split("/", 1)), expected[key].view(-1)) < 2**-4, key


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.float() - wanted).norm() / wanted.norm())
