"""Temperature, top-k and top-p against a reference in plain Python."""

import math

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_gemini.generation.choose import choose, shape_probabilities


def reference(logits: list[float], temperature: float, top_k: int, top_p: float) -> list[float]:
    """One sequence, token by token."""
    finite = [i for i, x in enumerate(logits) if x > -math.inf]
    order = sorted(finite, key=lambda i: (-logits[i], i))[: top_k or None]
    top = logits[order[0]]
    weight = {i: math.exp((logits[i] - top) / temperature) for i in order}
    total = sum(weight.values())
    kept, reached = [], 0.0
    for i in order:
        if reached >= top_p:
            break
        kept.append(i)
        reached += weight[i] / total
    mass = sum(weight[i] for i in kept)
    return [weight[i] / mass if i in kept else 0.0 for i in range(len(logits))]


# Multiples of 1/4 with a temperature of the same kind make ties common; the sums below then never meet top_p exactly.
@settings(max_examples=200, deadline=None)
@given(
    logits=st.lists(st.integers(-20, 20).map(lambda i: i / 4) | st.just(-math.inf), min_size=2, max_size=12).filter(
        lambda xs: max(xs) > -math.inf
    ),
    temperature=st.sampled_from([0.25, 0.5, 1.0, 2.0]),
    top_k=st.integers(0, 13),
    top_p=st.floats(0.01, 0.999) | st.just(1.0),
)
def test_probabilities_equal_the_reference(logits: list[float], temperature: float, top_k: int, top_p: float) -> None:
    expected = reference(logits, temperature, top_k, top_p)
    near = [reference(logits, temperature, top_k, min(top_p + e, 1.0)) for e in (-1e-5, 1e-5)]
    got = shape_probabilities(torch.tensor([logits]), temperature, top_k, top_p)[0].tolist()
    assert any(np.allclose(got, p, atol=1e-5) for p in (expected, *near))


def test_top_p_keeps_the_token_that_reaches_it() -> None:
    logits_BV = torch.tensor([[0.5, 0.3, 0.2]]).log()
    assert shape_probabilities(logits_BV, 1.0, 0, 0.6)[0].tolist() == [0.625, 0.375, 0.0]


def test_temperature_zero_takes_the_likeliest() -> None:
    assert choose(torch.tensor([[0.0, 3.0, 1.0], [9.0, 3.0, 1.0]]), 0.0, 0, 1.0, []) == [1, 0]


def test_draws_follow_the_probabilities() -> None:
    logits_BV = torch.tensor([[0.5, 0.3, 0.2, 0.0]]).log().expand(4000, 4)
    generators = [torch.Generator().manual_seed(seed) for seed in range(4000)]
    share = np.bincount(choose(logits_BV, 1.0, 0, 1.0, generators), minlength=4) / 4000
    assert np.abs(share - [0.5, 0.3, 0.2, 0.0]).max() < 0.03
    assert share[3] == 0


def test_a_forbidden_token_is_never_drawn_at_the_ends_of_the_range(monkeypatch) -> None:
    logits_BV = torch.tensor([[-math.inf, 0.0, -math.inf, 0.0, -math.inf]])
    for number, token in ((0.0, 1), (1 - 2**-53, 3)):
        monkeypatch.setattr(torch, "rand", lambda *a, number=number, **k: torch.tensor(number, dtype=torch.float64))
        assert choose(logits_BV, 1.0, 0, 1.0, [torch.Generator()]) == [token]


def test_a_sequence_draws_the_same_beside_any_batch_mates() -> None:
    logits_BV = torch.randn(3, 20, generator=torch.Generator().manual_seed(0))
    together = choose(logits_BV, 1.0, 5, 0.9, [torch.Generator().manual_seed(s) for s in (4, 5, 6)])
    alone = [choose(logits_BV[i : i + 1], 1.0, 5, 0.9, [torch.Generator().manual_seed(4 + i)])[0] for i in range(3)]
    assert together == alone
