"""Initial values are a function of (seed, name, global index) alone, and look normal."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from megatron_gemini.parallel import parameters
from megatron_gemini.parallel.parameters import (
    Placement,
    constant,
    declare,
    initialize,
    initialize_parameter,
    new_parameter,
    normal,
    zeros,
)
from megatron_gemini.parallel.random_numbers import _erfinv, _log, normal_at


def filled(shape, placement=None, name="w", seed=0, std=1.0, dtype=torch.float32):
    parameter = nn.Parameter(torch.full(shape, torch.nan, dtype=dtype))
    declare(parameter, normal(std), placement)
    initialize_parameter(name, parameter, seed)
    return parameter.detach()


def test_values_are_normal():
    values = normal_at(12345, torch.arange(200_000))
    moments = [(values**power).mean().item() for power in (1, 2, 3, 4)]
    for found, wanted, error in zip(moments, (0, 1, 0, 3), (0.01, 0.02, 0.03, 0.1), strict=True):
        assert abs(found - wanted) < error
    share = ((values.abs() > 3).double().mean() / math.erfc(3 / math.sqrt(2))).item()
    assert 0.85 < share < 1.15


def test_the_inverse_error_function_and_logarithm_equal_torch():
    x = torch.linspace(-1, 1, 100_001, dtype=torch.float64)[1:-1]
    torch.testing.assert_close(_erfinv(x), torch.erfinv(x), rtol=1e-6, atol=0)
    extremes = torch.tensor([2.0**-51, 1e-9, 0.5, 1.0, 1.5], dtype=torch.float64)
    torch.testing.assert_close(_log(extremes), extremes.log(), rtol=1e-9, atol=1e-9)
    assert _erfinv(torch.tensor([1 - 2.0**-52, 2.0**-52 - 1], dtype=torch.float64)).isfinite().all()


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), st.integers(0, 2), st.integers(1, 9))
def test_a_shard_equals_the_slice_of_the_whole_bit_for_bit(ranks, dim, local):
    shape = [3, 2, 4]
    shape[dim] = ranks * local
    whole = filled(shape)
    for rank in range(ranks):
        part = list(shape)
        part[dim] = local
        shard = filled(part, Placement(dim, tuple(shape), rank * local))
        assert torch.equal(shard, whole.narrow(dim, rank * local, local))


def test_a_shard_larger_than_a_chunk_equals_the_slice(monkeypatch):
    whole = filled([8, 6])
    monkeypatch.setattr(parameters, "_CHUNK", 5)
    assert torch.equal(filled([8, 6]), whole)
    assert torch.equal(filled([8, 3], Placement(1, (8, 6), 3)), whole[:, 3:])


def test_padding_rows_are_zero_and_the_others_those_of_the_whole():
    whole = filled([5, 3])
    last = filled([3, 3], Placement(0, (5, 3), 3))
    assert torch.equal(last[:2], whole[3:])
    assert (last[2] == 0).all()
    assert (filled([3, 3], Placement(0, (5, 3), 6)) == 0).all()


def test_name_and_seed_change_every_value():
    first = filled([100])
    for other in (filled([100], name="v"), filled([100], seed=1)):
        assert (first != other).all()
        assert abs(torch.corrcoef(torch.stack((first, other)))[0, 1]) < 0.4
    assert torch.equal(first, filled([100]))


def test_std_scales_and_low_precision_is_the_rounded_value():
    assert torch.equal(filled([50], std=0.5), filled([50]) * 0.5)
    assert torch.equal(filled([50], dtype=torch.bfloat16), filled([50], dtype=torch.float64).bfloat16())


def test_a_module_is_filled_by_the_full_names_of_its_parameters():
    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = new_parameter(4, 3, init=normal(0.1))
            self.bias = new_parameter(3, init=zeros())
            self.gain = new_parameter(3, init=constant(2.5))

    model = nn.ModuleDict({"a": Inner(), "b": Inner()})
    initialize(model, seed=3)
    assert torch.equal(model["a"].weight.detach(), filled([4, 3], name="a.weight", seed=3, std=0.1))
    assert not torch.equal(model["a"].weight, model["b"].weight)
    assert (model["a"].bias == 0).all() and (model["b"].gain == 2.5).all()
    assert model["a"].weight.placement == Placement(None, (4, 3))


def test_a_parameter_that_does_not_say_how_it_begins_is_named():
    with pytest.raises(ValueError, match=r"0\.weight does not say how it begins"):
        initialize(nn.Sequential(nn.Linear(2, 2)), seed=0)
