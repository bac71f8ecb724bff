"""Recomputed layers give the same bits as kept ones, keep less, and run as often as they say."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

from megatron_gemini.kernels.attention.api import plan_attention
from megatron_gemini.kernels.discarded_output import output_is_discarded
from megatron_gemini.models.decoder import Decoder
from megatron_gemini.models.gemini import Gemini
from megatron_gemini.parallel.parameters import initialize
from megatron_gemini.parallel.recompute import NO_RECOMPUTE, Recompute, RecomputeContext
from megatron_gemini.parallel.tensor.layers import LayerFactory
from megatron_gemini.parallel.topology import Topology
from tests.distributed.rows import CONFIG, LAYOUT, loss_of, rows

MODES = [(mode, offload) for mode in ("selective", "full") for offload in (False, True)]
ROWS = rows(0)[:3]  # of which the second has text only


def build(mode: str = "none", offload: bool = False) -> Gemini:
    engine = dataclasses.replace(CONFIG.engine, recompute=mode, offload_activations=offload)
    model = Gemini(dataclasses.replace(CONFIG, engine=engine), LAYOUT, LayerFactory(Topology.serial()), loss_of(CONFIG))
    initialize(model, seed=1)
    return model


def gradients(model: nn.Module) -> dict[str, torch.Tensor | None]:
    return {name: p.grad for name, p in model.named_parameters()}


def step(model: Gemini, first_in_first_out: bool = False) -> list[torch.Tensor]:
    """Losses of all rows, whose backwards come one by one, or in the order of a pipeline after all the forwards."""
    losses = []
    for row in ROWS:
        losses.append(model(row).loss)
        if not first_in_first_out:
            losses[-1].backward()
    if first_in_first_out:
        for loss in losses:
            loss.backward()
    return losses


@pytest.mark.parametrize("first_in_first_out", [False, True])
@pytest.mark.parametrize(("mode", "offload"), MODES)
def test_loss_and_gradients_are_the_same_bits(mode: str, offload: bool, first_in_first_out: bool) -> None:
    expected, found = build(), build(mode, offload)
    for a, b in zip(step(expected), step(found, first_in_first_out), strict=True):
        assert torch.equal(a, b)
    for name, gradient in gradients(found).items():
        assert gradient is not None and torch.equal(gradient, gradients(expected)[name]), name


def decoder(mode: str, offload: bool = False) -> tuple[Decoder, tuple]:
    """A decoder and what its forward takes after the hidden states."""
    model = Decoder(CONFIG.model, LAYOUT.size, LayerFactory(Topology.serial()), recompute=Recompute(mode, offload))
    initialize(model, seed=1)
    return model, (ROWS[0].position_T, plan_attention(ROWS[0].segment_T, ROWS[0].span_T))


def hidden(requires_grad: bool = True) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(len(ROWS[0].token_T), CONFIG.model.width, generator=generator).requires_grad_(requires_grad)


def counted(model: Decoder) -> Counter[str]:
    """Counts the forwards of every module of the layers."""
    counts: Counter[str] = Counter()
    for name, module in model.layers.named_modules():
        module.register_forward_hook(lambda *_, name=name: counts.update([name]))
    return counts


@pytest.mark.parametrize(
    ("mode", "attention", "mlp"),
    [("none", 1, 1), ("selective", 2, 1), ("full", 2, 2)],
    ids=["none", "selective", "full"],
)
def test_the_backward_recomputes_what_the_mode_says(mode: str, attention: int, mlp: int) -> None:
    model, rest = decoder(mode)
    counts = counted(model)
    out = model(hidden(), *rest)
    assert set(counts.values()) == {1}
    out.sum().backward()
    for layer in model.layers:
        assert (counts[f"{layer}.attention"], counts[f"{layer}.mlp"]) == (attention, mlp)


def saved_bytes(mode: str, offload: bool = False) -> int:
    """Bytes of distinct memory that the layers keep on the device, without their parameters and the rotation."""
    model, rest = decoder(mode, offload)
    own = {p.data_ptr() for p in model.parameters()}
    sizes: dict[int, int] = {}

    def note(x: torch.Tensor) -> torch.Tensor:
        if x.data_ptr() not in own:
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    h_TD = hidden() * 1
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        out = model(h_TD, *rest)
    assert out.requires_grad
    return sum(sizes.values())


def test_full_keeps_the_inputs_of_layers_only() -> None:
    one = hidden().nbytes
    norm = one + 4 * (len(ROWS[0].token_T) + CONFIG.model.width)  # the final norm keeps its input and two factors
    assert saved_bytes("full") == CONFIG.model.layers * one + norm
    assert saved_bytes("full", offload=True) == norm


def test_selective_keeps_less_than_none_and_more_than_full() -> None:
    assert saved_bytes("full") < saved_bytes("selective") < 0.8 * saved_bytes("none")


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_weights_get_gradients_although_the_input_wants_none(mode: str) -> None:
    (expected, rest), (found, _) = decoder("none"), decoder(mode)
    for model in (expected, found):
        model(hidden(requires_grad=False), *rest).sum().backward()
    compared = {name: g for name, g in gradients(found).items() if not name.startswith("embedding")}
    for name, gradient in compared.items():
        assert gradient is not None and torch.equal(gradient, gradients(expected)[name]), name


def test_without_gradients_nothing_is_kept_and_the_cache_is_used() -> None:
    model, rest = decoder("full", offload=True)

    asked: list[int] = []

    class Cache:
        def attend(self, index: int, q: torch.Tensor, k: Any, v: Any, plan: Any) -> torch.Tensor:
            asked.append(index)
            return torch.zeros_like(q)

    with torch.no_grad():
        assert model.recompute.begin().mode == "none"
        model(hidden(), *rest, Cache())
    assert asked == list(range(CONFIG.model.layers))


def test_only_the_recomputation_of_a_region_skips_its_last_product() -> None:
    """Of a whole layer that is the MLP's, and not the attention's, which the MLP reads."""
    seen: list[bool] = []

    def half(h_TD: torch.Tensor) -> torch.Tensor:
        seen.append(output_is_discarded())
        return h_TD * 2

    def layer(h_TD: torch.Tensor, recompute: RecomputeContext = NO_RECOMPUTE) -> torch.Tensor:
        return recompute.mlp(half, recompute.attention(half, h_TD))

    out = Recompute("full").begin().layer(layer, torch.ones(2, 3, requires_grad=True))
    assert seen == [False, False]
    out.sum().backward()
    assert seen == [False, False, False, True]
    Recompute("selective").begin().layer(layer, torch.ones(2, 3, requires_grad=True)).sum().backward()
    assert seen[4:] == [False, False, True]  # attention, MLP; attention


def test_a_setting_that_offloads_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"offload_activations is true but engine\.recompute is none"):
        dataclasses.replace(CONFIG.engine, offload_activations=True)
