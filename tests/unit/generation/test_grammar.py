"""Answers follow the grammar whatever the logits."""

import re
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_gemini.contracts import TokenLayout
from megatron_gemini.data.samples.items import Codes
from megatron_gemini.generation.choose import choose
from megatron_gemini.generation.code_runs import CodeRun, code_runs
from megatron_gemini.generation.grammar import Grammar
from megatron_gemini.generation.pieces import split_answer
from megatron_gemini.generation.settings import SampleSettings, answers
from megatron_gemini.modalities.spec import CodesSpec, ModalitySpec
from megatron_gemini.registry import MODALITIES

LAYOUT = TokenLayout(7, (("image", 5),))


def image_of(codes: int, layout: TokenLayout = LAYOUT) -> tuple[CodeRun, ...]:
    return code_runs(layout, {"image": codes})


def symbols(tokens: list[int], layout: TokenLayout = LAYOUT) -> str:
    """t text, c image code, b and e around an image, . eos, ? anything else."""
    names = {layout.control("image_begin"): "b", layout.control("image_end"): "e", layout.control("eos"): "."}
    return "".join(
        names.get(token) or ("t" if layout.is_text(token) else "c" if token in layout.code_range("image") else "?")
        for token in tokens
    )


def sample(grammar: Grammar, seed: int) -> str:
    """One answer from random logits."""
    noise, own = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed)
    tokens: list[int] = []
    while True:
        logits_BV = torch.randn(1, LAYOUT.size, generator=noise) * 5
        logits_BV[~grammar.allowed()] = float("-inf")
        tokens += choose(logits_BV, 1.0, 0, 1.0, [own])
        if grammar.advance(tokens[-1:])[0]:
            return symbols(tokens)


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    codes=st.integers(1, 4),
    answer=st.sampled_from(["any", "text", "image"]),
    max_tokens=st.integers(7, 30),
)
def test_random_logits_give_only_legal_answers(seed: int, codes: int, answer: str, max_tokens: int) -> None:
    drawn = sample(Grammar(LAYOUT, image_of(codes), answer, max_tokens, 1), seed)
    image = f"bc{{{codes}}}e"
    pattern = {"any": rf"(t|{image})*\.?", "text": r"t*\.?", "image": rf"{image}\."}[answer]
    assert re.fullmatch(pattern, drawn), drawn
    assert len(drawn) <= max_tokens
    assert drawn.endswith(".") or len(drawn) == max_tokens


def test_random_answers_hold_text_and_images() -> None:
    drawn = [sample(Grammar(LAYOUT, image_of(2), "any", 30, 1), seed) for seed in range(60)]
    assert any("bcce" in answer for answer in drawn)
    assert any("t" in answer for answer in drawn)
    assert any(answer == "." for answer in drawn)


def test_no_image_begins_that_would_not_fit() -> None:
    begin = LAYOUT.control("image_begin")
    assert Grammar(LAYOUT, image_of(4), "any", 7, 1).allowed()[0, begin]
    assert not Grammar(LAYOUT, image_of(4), "any", 6, 1).allowed()[0, begin]


def test_an_image_has_none_of_the_codes_behind_its_own_range() -> None:
    layout = TokenLayout(7, (("image", 5), ("sound", 3)))
    grammar = Grammar(layout, image_of(4, layout), "image", 50, 1)
    grammar.advance([layout.control("image_begin")])
    assert grammar.allowed()[0].nonzero().flatten().tolist() == list(layout.code_range("image"))


def test_a_model_without_image_codes_never_draws() -> None:
    layout = TokenLayout(7, (("image", 0),))
    assert not Grammar(layout, image_of(4, layout), "any", 50, 1).allowed()[0, layout.control("image_begin")]
    with pytest.raises(
        ValueError, match=r"generate\.answer is image, but this model makes no image: it has no image codes, or"
    ):
        Grammar(layout, image_of(4, layout), "image", 50, 1)


def test_an_image_that_max_tokens_cuts_off_is_refused() -> None:
    with pytest.raises(ValueError, match="max_tokens is 6; one image needs 7"):
        Grammar(LAYOUT, image_of(4), "image", 6, 1)


def test_sequences_keep_their_states_when_others_are_dropped() -> None:
    grammar = Grammar(LAYOUT, image_of(2), "any", 20, 3)
    grammar.advance([0, LAYOUT.control("image_begin"), LAYOUT.control("eos")])
    grammar.keep([1, 0])
    assert grammar.in_codes() == [True, False]
    assert grammar.allowed()[0].nonzero().flatten().tolist() == list(
        range(LAYOUT.code_range("image").start, LAYOUT.size)
    )


SOUND = ModalitySpec(
    "sound",
    codes=CodesSpec("sound_codes", ("sound.json",), size=lambda config: 3, length=lambda config: 2, setting="s"),
)
TWO = TokenLayout(7, (("image", 5), ("sound", 3)))


@pytest.fixture
def two_kinds() -> Iterator[tuple[CodeRun, ...]]:
    """Images of four codes, and sounds of two."""
    MODALITIES.register("sound", SOUND)
    yield code_runs(TWO, {"image": 4, "sound": 2})
    MODALITIES.unregister("sound")


def kinds_that_may_begin(grammar: Grammar, runs: tuple[CodeRun, ...]) -> set[str]:
    return {run.modality for run in runs if grammar.allowed()[0, run.begin]}


def test_of_two_kinds_of_codes_those_may_begin_that_fit(two_kinds: tuple[CodeRun, ...]) -> None:
    fitting = {8: {"image", "sound"}, 7: {"image", "sound"}, 6: {"sound"}, 5: {"sound"}, 4: set()}
    assert {n: kinds_that_may_begin(Grammar(TWO, two_kinds, "any", n, 1), two_kinds) for n in fitting} == fitting
    assert kinds_that_may_begin(Grammar(TWO, two_kinds, "sound", 9, 1), two_kinds) == {"sound"}


def test_a_run_of_codes_is_of_its_own_kind_and_length(two_kinds: tuple[CodeRun, ...]) -> None:
    image, sound = two_kinds
    grammar = Grammar(TWO, two_kinds, "any", 30, 1)
    for run in (sound, image, sound):
        grammar.advance([run.begin])
        for code in run.codes[: run.length]:
            assert grammar.in_codes() == [True]
            assert grammar.allowed()[0].nonzero().flatten().tolist() == list(run.codes)
            grammar.advance([code])
        assert grammar.in_codes() == [False]
        assert grammar.allowed()[0].nonzero().flatten().tolist() == [run.end]
        grammar.advance([run.end])
    assert split_answer(TWO, two_kinds, [sound.begin, *sound.codes[:2], sound.end, 4]) == [Codes("sound", (0, 1)), [4]]


def test_what_is_made_as_codes_may_be_asked_for(two_kinds: tuple[CodeRun, ...]) -> None:
    assert answers() == ("any", "text", "image", "sound")
    assert SampleSettings(answer="sound").answer == "sound"
    with pytest.raises(ValueError, match="this model makes no sound: it has no sound codes; ask for text instead"):
        Grammar(TWO, two_kinds[:1], "sound", 30, 1)
