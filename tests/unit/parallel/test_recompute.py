"""Recomputed layers give the same bits as kept ones, keep less, and run as often as they say."""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

from megatron_gemini.kernels.attention import plan_attention
from megatron_gemini.kernels.rope import rotation
from megatron_gemini.models.decoder import Decoder
from megatron_gemini.models.gemini import Gemini
from megatron_gemini.parallel.host_memory import OnHost
from megatron_gemini.parallel.layers import Layers
from megatron_gemini.parallel.parameters import initialize
from megatron_gemini.parallel.recompute import PLAIN, Recompute
from megatron_gemini.parallel.topology import Topology
from tests.distributed.rows import CONFIG, LAYOUT, rows

MODES = [(mode, offload) for mode in ("selective", "full") for offload in (False, True)]
ROWS = rows(0)[:3]  # of which the second has text only


def build(mode: str = "none", offload: bool = False) -> Gemini:
    engine = dataclasses.replace(CONFIG.engine, recompute=mode, offload_activations=offload)
    model = Gemini(dataclasses.replace(CONFIG, engine=engine), LAYOUT, Layers(Topology.serial()))
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
    model = Decoder(CONFIG.model, LAYOUT.size, Layers(Topology.serial()), recompute=Recompute(mode, offload))
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
    ("mode", "attention", "mlp"), [("none", 1, 1), ("selective", 2, 1), ("full", 2, 2)], ids=["none", "selective", "full"]
)
def test_the_backward_runs_again_what_the_mode_says(mode: str, attention: int, mlp: int) -> None:
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
            sizes[x.data_ptr()] = x.untyped_storage().nbytes()
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

    class Cache:
        layers: list[int] = []

        def attend(self, index: int, q: torch.Tensor, k: Any, v: Any, plan: Any) -> torch.Tensor:
            self.layers.append(index)
            return torch.zeros_like(q)

    with torch.no_grad():
        assert model.recompute.begin().mode == "none"
        model(hidden(), *rest, Cache())
    assert Cache.layers == list(range(CONFIG.model.layers))


def test_a_plain_pass_calls_through() -> None:
    assert PLAIN.attention(lambda h, x: h + x, torch.ones(1), 2.0) == 3


def chain(count: int) -> tuple[list[torch.Tensor], list[OnHost]]:
    tensors = [torch.randn(3, 2, generator=torch.Generator().manual_seed(seed)) for seed in range(count)]
    kept: list[OnHost] = []
    for tensor in tensors:
        kept.append(OnHost(tensor, kept[-1] if kept else None))
    return tensors, kept


def test_what_is_kept_comes_back_with_its_values_one_ahead() -> None:
    tensors, kept = chain(4)
    assert [item._x is not None for item in kept] == [False, False, False, True]
    for number in (3, 2, 1, 0):
        taken = kept[number].take()
        assert torch.equal(taken, tensors[number])
        assert [item._x is not None for item in kept[:number]] == [place == number - 1 for place in range(number)]


def test_what_is_kept_is_a_copy_that_shares_no_memory() -> None:
    tensors, kept = chain(2)
    original = tensors[0].clone()
    tensors[0].zero_()
    kept[1].take()
    assert torch.equal(kept[0].take(), original)


def test_what_is_kept_is_given_once_and_forgotten() -> None:
    _, kept = chain(1)
    kept[0].take()
    assert copy.copy(kept[0].__dict__)["_host"] is None
    with pytest.raises(AssertionError, match="taken twice"):
        kept[0].take()
