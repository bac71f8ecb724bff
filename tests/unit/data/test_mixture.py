"""What a lane draws: by weights, until a source is used up, in phases, and the same after any interruption."""

import json
from collections import Counter
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_gemini.config.data import DataConfig, PhaseConfig, SourceConfig
from megatron_gemini.data.loading.mixture import Mixture


@dataclass
class Finite:
    label: str
    weight: float = 1.0
    epochs: float = 0.0
    tokens: int = 0
    samples: int = 10

    def __len__(self):
        return self.samples


def data(*curriculum, sources=2, **settings):
    places = tuple(SourceConfig(shards=f"{i}.tar") for i in range(sources))
    return DataConfig(sources=places, curriculum=curriculum, **settings)


def mixture(sources, number=0, lanes=1, config=None, rows_per_step=1):
    config = config or data(sources=len(sources))
    return Mixture(number, lanes, sources, config, seed=0, rows_per_step=rows_per_step)


def draw(mix, count, row=0, tokens=3):
    taken = []
    for _ in range(count):
        drawn = mix.next(row)
        if drawn is None:
            break
        mix.spend(drawn[0], tokens)
        taken.append(drawn)
    return taken


weights = st.lists(st.floats(0.05, 20), min_size=1, max_size=5)


@given(weights, st.floats(0.5, 10), st.integers(1, 200))
def test_draws_are_within_two_of_their_share_at_any_time(weights, temperature, count):
    sources = [Finite(str(i), weight) for i, weight in enumerate(weights)]
    mix = mixture(sources, config=data(sources=len(sources), temperature=temperature))
    counts = Counter(source for source, _ in draw(mix, count))
    flat = [weight ** (1 / temperature) for weight in weights]
    for source, weight in enumerate(flat):
        assert abs(counts[source] - count * weight / sum(flat)) < len(weights)


@given(weights, st.integers(0, 40), st.integers(0, 3))
def test_a_resumed_lane_draws_what_the_uninterrupted_one_draws(weights, cut, lane):
    sources = [Finite(str(i), weight, epochs=2, tokens=100 * i) for i, weight in enumerate(weights)]
    whole = draw(mixture(sources, lane, 4), 80)
    first = mixture(sources, lane, 4)
    begun = draw(first, cut)
    second = mixture(sources, lane, 4)
    second.load_state(json.loads(json.dumps(first.state())))
    assert begun + draw(second, 80 - len(begun)) == whole


def test_over_all_lanes_every_sample_comes_as_often_as_its_source_has_epochs():
    sources = [Finite("a", 1.0, epochs=2, samples=7), Finite("b", 3.0, epochs=1.5, samples=10)]
    drawn = [draw(mixture(sources, lane, 3), 100) for lane in range(3)]
    positions = [sorted(p for lane in drawn for source, p in lane if source == which) for which in (0, 1)]
    assert positions == [list(range(14)), list(range(15))]


def test_a_source_that_is_used_up_leaves_its_share_to_the_others():
    sources = [Finite("a", 8.0, tokens=30), Finite("b", 1.0), Finite("c", 1.0)]
    counts = Counter(source for source, _ in draw(mixture(sources), 110))
    assert counts == {0: 10, 1: 50, 2: 50}
    one_of_two = [draw(mixture(sources[:1], lane, 2), 100) for lane in range(2)]
    assert [len(lane) for lane in one_of_two] == [5, 5]


def test_weights_change_at_their_steps():
    config = data(PhaseConfig(10, (0.0, 1.0)), PhaseConfig(20, (1.0, 1.0)), temperature=2.0)
    mix = mixture([Finite("a", 9.0), Finite("b", 1.0)], 1, 4, config, rows_per_step=2)
    assert [mix.shares(row) for row in (0, 4)] == [[0.75, 0.25]] * 2  # row 4 of lane 1 is row 17 of all, in step 8
    assert [mix.shares(row) for row in (5, 9)] == [[0.0, 1.0]] * 2
    assert mix.shares(10) == [0.5, 0.5]
    assert {source for source, _ in draw(mix, 30, row=5)} == {1}


def test_a_phase_begins_with_the_row_of_its_step_whichever_lane_draws_it():
    """Row r of lane l is row lanes * r + l of the run: with 8 lanes and 2 rows a step, lane 7 begins in step 3."""
    config = data(PhaseConfig(3, (0.0, 1.0)))
    both = [Finite("a"), Finite("b")]
    shares = [mixture(both, lane, 8, config, rows_per_step=2).shares(0) for lane in range(8)]
    assert shares == [[0.5, 0.5]] * 6 + [[0.0, 1.0]] * 2


def test_a_curriculum_that_does_not_fit_the_sources_is_refused():
    with pytest.raises(ValueError, match="gives 1 weights from step 5 on, and there are 2"):
        data(PhaseConfig(5, (1.0,)))
    with pytest.raises(ValueError, match=r"at the steps \[5, 5\]"):
        data(PhaseConfig(5, (1.0, 1.0)), PhaseConfig(5, (1.0, 0.0)))
    with pytest.raises(ValueError, match=r"weights is \[0\.0, 0\.0\]"):
        PhaseConfig(5, (0.0, 0.0))
