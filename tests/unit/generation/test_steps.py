"""Decoding step by step: what a step says, and that whatever ends it frees the cache at once."""

import gc
import weakref
from collections.abc import Callable

import pytest
import torch

from megatron_gemini.contracts import RowFormat
from megatron_gemini.data.packing.pack import pack
from megatron_gemini.generation.sample import generate
from megatron_gemini.generation.sequences import RecomputedSequences
from megatron_gemini.generation.settings import SampleSettings
from megatron_gemini.generation.steps import Decoding, Step
from megatron_gemini.models.gemini import Gemini
from tests.unit.generation.test_sample import CODES, LAYOUT, RUNS, document, prompts, tiny_config, tiny_model

EOS = LAYOUT.control("eos")


@pytest.fixture(scope="module")
def model() -> Gemini:
    return tiny_model(tiny_config())


def begin(model: Gemini, settings: SampleSettings | None = None) -> Decoding:
    return Decoding(model, LAYOUT, prompts(), settings or SampleSettings(max_tokens=30), RUNS)


def cached(decoding: Decoding) -> list[weakref.ref]:
    """The keys and values of all layers."""
    layers = decoding._sequences.cache._layers  # type: ignore[union-attr]
    return [weakref.ref(tensor) for layer in layers.values() for tensor in layer]


def freed(tensors: list[weakref.ref]) -> bool:
    return bool(tensors) and all(tensor() is None for tensor in tensors)


@pytest.fixture(autouse=True)
def no_garbage_collector():
    """What is freed at once is freed by its last reference; a collector that happens to run would hide a circle."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_the_tokens_of_the_steps_are_the_answers(model: Gemini, guidance: float) -> None:
    settings = SampleSettings(seed=3, guidance=guidance, max_tokens=20)
    answers: dict[int, list[int]] = {i: [] for i in range(len(prompts()))}
    ended: dict[int, str] = {}
    for step in begin(model, settings):
        assert [sampled.sequence for sampled in step.tokens] == [i for i in answers if i not in ended]
        for sampled in step.tokens:
            answers[sampled.sequence].append(sampled.token)
            if sampled.finish:
                ended[sampled.sequence] = sampled.finish
    for i, whole in enumerate(generate(model, LAYOUT, prompts(), settings, RUNS)):
        assert answers[i] == whole + [EOS] * (ended[i] == "eos")
        assert ended[i] == "eos" or len(whole) == 20
    assert set(ended.values()) == {"eos", "length"}, "both ends should occur, or one was not tested"


@pytest.mark.parametrize("cache", [True, False])
def test_the_log_probability_is_the_models_own(model: Gemini, cache: bool) -> None:
    """Neither guidance, the grammar, temperature, top-k nor top-p are in it; checked on whole sequences."""
    settings = SampleSettings(1.7, top_k=9, top_p=0.8, guidance=3.0, max_tokens=CODES + 3, answer="image", cache=cache)
    said: dict[int, list[tuple[int, float]]] = {}
    for step in begin(model, settings):
        for sampled in step.tokens:
            said.setdefault(sampled.sequence, []).append((sampled.token, sampled.logprob))
    for i, prompt in enumerate(prompts()):
        whole = RecomputedSequences(model, pack([prompt], len(prompt), RowFormat()))
        with torch.inference_mode():
            logits_1V = whole.start()
            for token, logprob in said[i]:
                assert logprob == pytest.approx(float(logits_1V[0].double().log_softmax(-1)[token]), abs=1e-4)
                logits_1V = whole.append([token])


def test_rollouts_of_a_prompt_differ_by_their_seeds_only(model: Gemini) -> None:
    settings = SampleSettings(seed=20, max_tokens=12, answer="text")
    decoding = Decoding(model, LAYOUT, prompts()[:2], settings, RUNS, samples=3)
    together: dict[int, list[int]] = {}
    for step in decoding:
        for sampled in step.tokens:
            together.setdefault(sampled.sequence, []).append(sampled.token)
    for sequence, tokens in together.items():
        alone = generate(model, LAYOUT, [prompts()[sequence // 3]], settings, RUNS, seeds=[20 + sequence])[0]
        assert [token for token in tokens if token != EOS] == alone
    assert len(together) == 6 and len({tuple(tokens) for tokens in together.values()}) > 4


def test_a_dropped_sequence_ends_and_the_others_go_on_as_if_nothing_had_been(model: Gemini) -> None:
    settings = SampleSettings(seed=3, guidance=2.0, max_tokens=12)
    answers: list[list[int]] = [[] for _ in prompts()]
    with begin(model, settings) as decoding:
        for number, step in enumerate(decoding):
            for sampled in step.tokens:
                answers[sampled.sequence].append(sampled.token)
            if number == 2:
                assert {1, 3} <= set(decoding.live)
                decoding.drop([1, 3])
                decoding.drop([1])  # who cancels may do it twice
                assert not {1, 3} & set(decoding.live)
    whole = generate(model, LAYOUT, prompts(), settings, RUNS)
    for i, answer in enumerate(answers):
        expected = whole[i][:3] if i in (1, 3) else whole[i]
        assert [token for token in answer if token != EOS] == expected


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("ended", [[0], [1, 3], [4]])
def test_a_drawing_goes_on_with_its_own_twin_once_another_has_ended(
    model: Gemini, ended: list[int], cache: bool
) -> None:
    """Each twin has the codes of its own sequence, and the guidance is strong enough that another's would show."""
    settings = SampleSettings(seed=3, guidance=100.0, max_tokens=CODES + 3, answer="image", cache=cache)
    whole = generate(model, LAYOUT, prompts(), settings, RUNS)
    left = [i for i in range(len(prompts())) if i not in ended]
    answers: list[list[int]] = [[] for _ in prompts()]
    with begin(model, settings) as decoding:
        for number, step in enumerate(decoding):
            for sampled in step.tokens:
                answers[sampled.sequence].append(sampled.token)
            if number == 2:  # behind two codes, by which the twins differ
                decoding.drop(ended)
    assert [answers[i][:-1] for i in left] == [whole[i] for i in left]
    assert len({tuple(whole[i]) for i in left}) == len(left), "equal drawings would have equal twins"


def test_a_sequence_dropped_before_the_first_step_is_never_computed(model: Gemini) -> None:
    decoding = begin(model, SampleSettings(seed=3, max_tokens=5))
    decoding.drop([0, 2, 3])
    assert [sampled.sequence for sampled in next(decoding).tokens] == [1, 4]
    decoding.drop([1, 4])
    assert list(decoding) == []


def test_keys_of_a_dropped_sequence_are_freed_at_once(model: Gemini) -> None:
    decoding = begin(model)
    next(decoding)
    before, size = cached(decoding), bytes_of(decoding)
    decoding.drop([0, 1, 2])
    assert freed(before)
    assert bytes_of(decoding) == size * 2 // 5


def bytes_of(decoding: Decoding) -> int:
    return sum(tensor().untyped_storage().nbytes() for tensor in cached(decoding))  # type: ignore[union-attr]


def test_keys_of_an_ended_sequence_are_freed_before_its_last_step_is_given(model: Gemini) -> None:
    decoding = begin(model, SampleSettings(max_tokens=CODES + 3, answer="image", guidance=2.0))
    next(decoding)
    kept = cached(decoding)
    steps = list(decoding)
    assert {sampled.finish for sampled in steps[-1].tokens} == {"eos"}
    assert freed(kept)


def abandon_by_close(decoding: Decoding) -> None:
    decoding.close()
    assert list(decoding) == []


def abandon_by_leaving_with(decoding: Decoding) -> None:
    with decoding:
        pass


def abandon_by_error_in_with(decoding: Decoding) -> None:
    with pytest.raises(KeyError), decoding:
        raise KeyError


@pytest.mark.parametrize("abandon", [abandon_by_close, abandon_by_leaving_with, abandon_by_error_in_with])
def test_an_abort_frees_the_cache_while_the_iterator_is_still_held(
    model: Gemini, abandon: Callable[[Decoding], None]
) -> None:
    decoding = begin(model, SampleSettings(max_tokens=30, guidance=2.0))
    next(decoding)
    kept = cached(decoding)
    assert not freed(kept)
    abandon(decoding)
    assert freed(kept)
    assert decoding.live == []


def test_a_dropped_iterator_frees_the_cache(model: Gemini) -> None:
    decoding = begin(model)
    next(decoding)
    kept = cached(decoding)
    del decoding
    assert freed(kept)


def test_a_consumer_that_raises_frees_the_cache(model: Gemini) -> None:
    held: list[weakref.ref[Decoding]] = []
    kept: list[weakref.ref] = []

    def watch(decoding: Decoding) -> Decoding:
        held.append(weakref.ref(decoding))
        return decoding

    with pytest.raises(RuntimeError, match="consumer") as error:
        for _ in watch(begin(model)):
            kept += cached(held[0]())  # type: ignore[arg-type]
            raise RuntimeError("consumer")
    assert error.tb is not None and freed(kept)


def test_an_error_inside_a_step_frees_the_cache_although_its_traceback_is_held(model: Gemini, monkeypatch) -> None:
    decoding = begin(model)
    next(decoding)
    kept = cached(decoding)
    monkeypatch.setattr(model, "logits", lambda h_TD: (_ for _ in ()).throw(torch.OutOfMemoryError("none left")))
    with pytest.raises(torch.OutOfMemoryError) as held:
        next(decoding)
    assert held.tb is not None and freed(kept)
    assert list(decoding) == []


def test_the_caller_may_train_between_two_steps(model: Gemini) -> None:
    decoding = begin(model)
    next(decoding)
    assert not torch.is_inference_mode_enabled()
    weight = torch.ones(3, requires_grad=True)
    (weight * 2).sum().backward()
    assert isinstance(next(decoding), Step)


def test_no_documents_make_no_steps(model: Gemini) -> None:
    assert list(Decoding(model, LAYOUT, [], SampleSettings(), RUNS)) == []


def test_a_sequence_that_is_not_there_cannot_be_dropped(model: Gemini) -> None:
    with pytest.raises(AssertionError, match="no such sequence"):
        Decoding(model, LAYOUT, [document()], SampleSettings(), RUNS).drop([1])


def test_an_impossible_image_is_refused_before_the_first_step(model: Gemini) -> None:
    with pytest.raises(ValueError, match="max_tokens is 3"):
        begin(model, SampleSettings(answer="image", max_tokens=3))
