"""Layers split over pipeline stages by cost."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_gemini.config.model import ModelConfig
from megatron_gemini.parallel.stages import split_layers, stage_layers


def most_expensive(counts, layer_cost, head_cost):
    return max(*(count * layer_cost for count in counts[:-1]), counts[-1] * layer_cost + head_cost)


@given(st.integers(2, 4), st.integers(0, 6), st.floats(0.1, 10), st.floats(0, 50))
def test_no_other_split_has_a_cheaper_dearest_stage(stages, more, layer_cost, head_cost):
    layers = stages + more
    parts = split_layers(layers, stages, layer_cost, head_cost)
    assert [layer for part in parts for layer in part] == list(range(layers))
    assert all(parts)
    every = itertools.product(range(1, layers + 1), repeat=stages)
    best = min(most_expensive(counts, layer_cost, head_cost) for counts in every if sum(counts) == layers)
    assert most_expensive([len(part) for part in parts], layer_cost, head_cost) == pytest.approx(best)


def test_a_large_vocabulary_takes_layers_from_the_last_stage():
    model = ModelConfig(width=2048, layers=18, heads=8, head_width=256, mlp_width=16384)  # Gemma-2B
    assert [len(part) for part in stage_layers(model, 256_000, 8192, 4)] == [5, 6, 6, 1]
    assert [len(part) for part in stage_layers(model, 1_000, 8192, 4)] == [4, 5, 5, 4]


def test_more_stages_than_layers_are_an_error():
    with pytest.raises(ValueError, match=r"5 stages need as many layers, but there are 4"):
        split_layers(4, 5, 1.0, 0.0)


def test_long_rows_make_layers_dearer_beside_the_head() -> None:
    model = ModelConfig(width=64, layers=12, heads=4, kv_heads=1, head_width=16, mlp_width=128)
    last = [len(stage_layers(model, 32_000, row_tokens, 3)[-1]) for row_tokens in (64, 1 << 20)]
    assert last == [1, 4]
