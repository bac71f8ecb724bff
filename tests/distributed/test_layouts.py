"""Every layout trains like one process without DeepSpeed.

The oracle is a plain loop: the serial model, started from the same seed, torch's AdamW, torch's gradient clipping,
the loss as a sum over all rows of the step divided by the sum of the weights. It shares with the layouts only the
model's code and the rule for initial values. ZeRO, DeepSpeed, accumulation, every kind of parallelism, the load
balancing and recomputation of the encoders, our norm and our clipping are all absent from it. The clipping bound binds
on most steps (asserted), so that a wrong norm bends the curve; one row has text only; rows have unequal targets;
initial weights come from the seed on every rank and are never copied.

Compared over six steps: the loss, the global norm, and every gradient before clipping, put together from the pieces
of all ranks, to 1e-5; final weights to a hundredth of the learning rate, with Adam's eps large enough (1e-4) that
rounding of a gradient near zero does not turn into a step. For gradients, 1e-5 is of the largest value of their
parameter.

Layouts of one world size share a launch.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_gemini.checkpoint.piece import WEIGHT
from megatron_gemini.checkpoint.pieces import PieceReader
from megatron_gemini.models.gemini import Gemini
from megatron_gemini.models.stage import DecoderStage
from megatron_gemini.parallel.parameters import initialize
from megatron_gemini.parallel.tensor.layers import LayerFactory
from megatron_gemini.parallel.topology import Topology
from tests.distributed.layout_roles import CRITIC, LR_SCALE, WeighedLoss, weigh
from tests.distributed.rows import CONFIG, LAYOUT, loss_of, rows, total_weight, with_layout
from tests.distributed.train_layouts import MORE, NOT_PLAIN, STEPS, begins
from tests.ranks import run_ranks

pytestmark = pytest.mark.timeout(1800)  # the first case of a world size waits for the launch of them all
CPU = {"offload_optimizer": "cpu"}
ALL_CPU = {"offload_optimizer": "cpu", "offload_parameters": "cpu"}
FEW = {"few_live": True}  # else ZeRO-3 keeps these few weights gathered through a step, without its hooks
BREADTH = {"schedule": "breadth_first"}
AGAIN = {"recompute": "full", "offload_activations": True}

NVME = {"offload_optimizer": "nvme", "mlp_width": 3072}  # DeepSpeed keeps what is smaller than 1 MiB in memory

LAYOUTS: dict[int, list[dict[str, Any]]] = {
    1: [
        {"zero_stage": 3, **NVME},
        {"zero_stage": 3, **NVME, "offload_parameters": "nvme"},
    ],
    2: [
        {"zero_stage": 0},
        {"zero_stage": 1},
        {"zero_stage": 1, **CPU},
        {"zero_stage": 2},
        {"zero_stage": 2, **CPU},
        {"zero_stage": 3, **FEW},
        {"zero_stage": 3, **CPU},
        {"zero_stage": 3, **ALL_CPU},
        {"zero_stage": 3, **ALL_CPU, **AGAIN},
        {"tensor": 2, "zero_stage": 0},
        {"tensor": 2, "zero_stage": 1, **CPU},
        {"tensor": 2, "zero_stage": 2, "tied": False},
        {"tensor": 2, "zero_stage": 3, **ALL_CPU},
        {"pipeline": 2, "zero_stage": 0},
        {"pipeline": 2, "zero_stage": 1, **CPU},
        {"pipeline": 2, "zero_stage": 3, **CPU, "tied": False, "frozen": "vision"},
        {"pipeline": 2, "zero_stage": 2, **BREADTH},
        {"pipeline": 2, "zero_stage": 3, "virtual_stages": 2, **BREADTH},
        {"pipeline": 2, "zero_stage": 1, "virtual_stages": 2, "schedule": "interleaved"},
    ],
    4: [
        {"tensor": 2, "zero_stage": 3, **CPU, **FEW},
        {"tensor": 2, "sequence": True, "zero_stage": 2, **CPU},
        {"tensor": 2, "sequence": True, "zero_stage": 2, **CPU, **AGAIN, "recompute": "selective"},
        {"tensor": 4, "sequence": True, "zero_stage": 1, "tied": False},
        {"context": 2, "zero_stage": 3, **CPU, **FEW},
        {"context": 4, "zero_stage": 0},
        {
            "tensor": 2,
            "sequence": True,
            "context": 2,
            "zero_stage": 1,
            **CPU,
            "frozen": "audio",
            "frozen_connectors": "vision",
        },
        {"pipeline": 2, "zero_stage": 2, **CPU},
        {"pipeline": 2, "zero_stage": 3, **ALL_CPU, "encoder_engines_zero": 1},
        {"pipeline": 4, "zero_stage": 1, "frozen": "vision audio", "frozen_connectors": "vision audio"},
        {"tensor": 2, "pipeline": 2, "zero_stage": 3, **CPU},
        {"tensor": 2, "sequence": True, "pipeline": 2, "zero_stage": 3, **ALL_CPU},
        {"tensor": 2, "sequence": True, "pipeline": 2, "zero_stage": 3, **ALL_CPU, **AGAIN},
        {"tensor": 2, "pipeline": 2, "zero_stage": 0, "virtual_stages": 2, "schedule": "interleaved", "tied": False},
        {"context": 2, "pipeline": 2, "zero_stage": 3, "virtual_stages": 2, **BREADTH},
        {"tensor": 2, "sequence": True, "pipeline": 2, "zero_stage": 3, **CPU, "toy_connectors": True},
        {"context": 2, "pipeline": 2, "zero_stage": 1, "virtual_stages": 2, **BREADTH, "toy_connectors": True},
        {"tensor": 2, "pipeline": 2, "zero_stage": 1, **CPU, "roles": True},
        {"pipeline": 2, "zero_stage": 1, "virtual_stages": 2, **BREADTH, "roles": True},
    ],
    8: [
        {"tensor": 2, "pipeline": 2, "zero_stage": 3, **CPU},
        {"tensor": 2, "sequence": True, "pipeline": 2, "zero_stage": 1, "virtual_stages": 2, **BREADTH},
        {"tensor": 2, "sequence": True, "context": 2, "pipeline": 2, "zero_stage": 3, **CPU},
        {"zero_stage": 3, "encoder_engines_zero": 0},
    ],
}


def name(layout: dict) -> str:
    return ",".join(f"{key}={value}" for key, value in layout.items())


CASES = [
    pytest.param(world, layout, id=f"{world}-{name(layout)}", marks=[pytest.mark.long] if world in (1, 8) else [])
    for world, layouts in LAYOUTS.items()
    for layout in layouts
]


def launch(ranks: int, layouts: list[dict], out: Path, elsewhere: str = "") -> list[dict]:
    """What `train_layouts` found on `ranks` gloo ranks; elsewhere: a checkpoint to go on from as well."""
    given = (out, json.dumps(layouts), *([elsewhere] if elsewhere else []))
    ended = run_ranks("tests.distributed.train_layouts", ranks, *given, log=out.with_suffix(".log"))
    if ended.status:  # not an exception: every case would launch again
        return [{"failed": ended.output[-10000:]}] * len(layouts)
    return json.loads(out.read_text())


def nvme_builds() -> bool:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    return AsyncIOBuilder().is_compatible(verbose=False)


@functools.cache
def oracle(
    tied: bool, frozen: str, frozen_connectors: str, toys: bool, mlp_width: int, roles: bool
) -> tuple[list[list[float]], list[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    """([loss, norm] a step, gradients a step, final weights) of the plain loop; the critic's names begin so.

    Its loss joins the policy's, without a gradient for the encoders, which are the policy's.
    """
    config = with_layout(tied=tied, toy_connectors=toys, mlp_width=mlp_width)
    model = Gemini(config, LAYOUT, LayerFactory(Topology.serial()), loss_of(config))
    losses = (WeighedLoss(loss_of(config)), loss_of(config))
    initialize(model, CONFIG.train.seed)
    for encoder in frozen.split():
        model.encoders[encoder].requires_grad_(False)
    for connector in frozen_connectors.split():
        model.connectors[connector].requires_grad_(False)
    named = dict(model.named_parameters())
    critic, reference = (DecoderStage(config, LAYOUT, LayerFactory(Topology.serial()), loss=loss) for loss in losses)
    for role in (critic, reference) if roles else ():
        initialize(role, CONFIG.train.seed)
    if roles:
        named |= {f"{CRITIC}:{n}": p for n, p in critic.named_parameters()}
    trained = {n: p for n, p in named.items() if p.requires_grad}
    groups = [
        {
            "params": [parameter],
            "weight_decay": CONFIG.optimizer.weight_decay if parameter.ndim >= 2 and "embedding" not in n else 0,
            "lr": CONFIG.optimizer.lr * (LR_SCALE if n.startswith(CRITIC) else 1),
        }
        for n, parameter in trained.items()
    ]
    optimizer = torch.optim.AdamW(groups, lr=CONFIG.optimizer.lr, betas=(0.9, 0.95), eps=1e-4)
    curve, gradients = [], []
    for step in range(STEPS):
        everything = rows(step, config.encoders)
        loss = sum(model(row).loss for row in everything)
        if roles:
            with torch.no_grad():
                inputs = [model._encode(row) for row in everything]
                weigh(inputs, [reference(row=row) for row in inputs])
            loss = loss + sum(critic(row=row).loss for row in inputs)
        loss = loss / total_weight(everything)
        optimizer.zero_grad()
        loss.backward()
        gradients.append({n: p.grad.clone() for n, p in trained.items()})
        norm = torch.nn.utils.clip_grad_norm_(trained.values(), CONFIG.engine.gradient_clipping)
        optimizer.step()
        curve.append([loss.item(), norm.item()])
    assert sum(norm > CONFIG.engine.gradient_clipping for _, norm in curve) > STEPS // 2
    return curve, gradients, {name: p.detach() for name, p in named.items()}


def oracle_of(layout: dict) -> tuple:
    frozen = (layout.get("frozen", ""), layout.get("frozen_connectors", ""))
    toys = layout.get("toy_connectors", False)
    width = layout.get("mlp_width", CONFIG.model.mlp_width)
    return oracle(layout.get("tied", True), *frozen, toys, width, layout.get("roles", False))


def whole(directory: Path, layout: dict) -> dict[str, torch.Tensor]:
    """The parameters that the pieces of a folder make, those of the critic with its name before them."""
    found = {}
    for role in ("", CRITIC) if "roles" in layout else ("",):
        reader = PieceReader(directory, role)
        found |= {f"{role}:{n}".removeprefix(":"): reader.read(WEIGHT, n) for n in reader.names()}
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """results(world, layout): what its launch found; launched when first asked for, once a world size."""
    folder = tmp_path_factory.mktemp("layouts")

    @functools.cache
    def of_world(world: int) -> dict[str, dict]:
        if world == 1 and not nvme_builds():
            pytest.skip("offload to NVMe needs libaio's headers and a compiler")
        elsewhere = "" if world <= 2 else of_world(2)[name({"zero_stage": 3, **CPU})].get("checkpoint", "")
        found = launch(world, LAYOUTS[world], folder / f"{world}.json", elsewhere)
        pieces = [folder / f"{world}-{number}" for number in range(len(found))]
        pairs = zip(LAYOUTS[world], found, pieces, strict=True)
        return {name(layout): result | {"pieces": where} for layout, result, where in pairs}

    def result(world: int, layout: dict) -> dict:
        found = of_world(world)[name(layout)]
        assert "failed" not in found, found["failed"]
        return found

    return result


@pytest.mark.parametrize(("world", "layout"), CASES)
def test_loss_and_norm_are_those_of_the_plain_loop(world: int, layout: dict, results: Any) -> None:
    found = torch.tensor(results(world, layout)["curve"])
    torch.testing.assert_close(found, torch.tensor(oracle_of(layout)[0]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("world", "layout"), CASES)
def test_gradients_are_those_of_the_plain_loop(world: int, layout: dict, results: Any) -> None:
    for step, expected in enumerate(oracle_of(layout)[1]):
        found = whole(results(world, layout)["pieces"] / f"gradients-{step}", layout)
        assert set(found) == set(expected)
        for parameter, gradient in expected.items():
            largest, worst = float(gradient.abs().max()), float((found[parameter] - gradient).abs().max())
            assert worst <= 1e-5 * max(largest, 1e-3), f"step {step}, {parameter}: off by {worst}, largest {largest}"


@pytest.mark.parametrize(("world", "layout"), CASES)
def test_the_final_weights_are_those_of_the_plain_loop(world: int, layout: dict, results: Any) -> None:
    found, weights = whole(Path(results(world, layout)["checkpoint"]), layout), oracle_of(layout)[2]
    assert set(found) == set(weights)
    for parameter, expected in weights.items():
        torch.testing.assert_close(
            found[parameter], expected, rtol=0, atol=1e-2 * CONFIG.optimizer.lr, msg=lambda m, p=parameter: f"{p}: {m}"
        )


@pytest.mark.parametrize(("world", "layout"), CASES)
def test_a_resumed_run_goes_on_to_the_bit(world: int, layout: dict, results: Any) -> None:
    result = results(world, layout)
    assert len(result["onward"]) == MORE
    assert [[x.hex() for x in row] for row in result["resumed"]] == [[x.hex() for x in row] for row in result["onward"]]


MOVED = [case for case in CASES if case.values[0] > 2 and not NOT_PLAIN & set(case.values[1])]


@pytest.mark.parametrize(("world", "layout"), MOVED)
def test_a_checkpoint_of_another_layout_goes_on_the_same(world: int, layout: dict, results: Any) -> None:
    """From two data-parallel ranks under ZeRO-3 with offload."""
    expected = results(2, {"zero_stage": 3, **CPU})["onward"]
    found = results(world, layout)["moved"]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-5, atol=1e-6)


BEGUN = [case for case in CASES if case.values[0] > 2 and begins(case.values[1])]


@pytest.mark.parametrize(("world", "layout"), BEGUN)
def test_weights_of_another_layout_give_the_same_first_loss(world: int, layout: dict, results: Any) -> None:
    """By `init_from`, of a whole model: from one tensor-parallel rank to several, also into frozen encoders."""
    (expected, norm), *_ = results(2, {"zero_stage": 3, **CPU})["onward"]
    ((found, its_norm),) = results(world, layout)["begun"]
    assert found == pytest.approx(expected, rel=1e-5)
    assert "frozen" in layout or its_norm == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize(("world", "layout"), [case for case in CASES if "recompute" in case.values[1]])
def test_recomputation_changes_no_bit(world: int, layout: dict, results: Any) -> None:
    kept = {key: value for key, value in layout.items() if key not in AGAIN}
    assert results(world, layout)["curve"] == results(world, kept)["curve"]
