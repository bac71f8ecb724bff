"""Pieces of a growing answer, put together, are those of the whole answer, and no half character is ever given."""

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_gemini.contracts import TokenLayout
from megatron_gemini.data.samples.items import Codes
from megatron_gemini.generation import pieces
from megatron_gemini.generation.code_runs import CodeRun, code_runs
from megatron_gemini.generation.pieces import GrowingAnswer, split_answer
from megatron_gemini.modalities.text.tokenizer import TextTokenizer
from tests.tiny_checkpoint import train_text_model


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> TextTokenizer:
    path = tmp_path_factory.mktemp("text") / "text.model"
    train_text_model(path)
    return TextTokenizer(path)


@pytest.fixture(scope="module")
def byte_ids(tokenizer: TextTokenizer) -> dict[int, int]:
    """The id of every byte piece, by the byte."""
    model = sentencepiece.SentencePieceProcessor(str(tokenizer.path))
    return {byte: model.PieceToId(f"<0x{byte:02X}>") for byte in range(256)}


def images(layout: TokenLayout) -> tuple[CodeRun, ...]:
    return code_runs(layout, {"image": 2})


def growing(tokenizer: TextTokenizer) -> GrowingAnswer:
    layout = TokenLayout(tokenizer.size, (("image", 4),))
    return GrowingAnswer(layout, images(layout), tokenizer.decode)


def given_by(answer: GrowingAnswer, tokens: list[int]) -> list[str | Codes]:
    return [piece for token in tokens for piece in answer.add(token)] + answer.end()


def joined(found: list[str | Codes]) -> list[str | Codes]:
    """Neighboring texts as one."""
    whole: list[str | Codes] = []
    for piece in found:
        last = whole[-1] if whole else None
        if isinstance(piece, str) and isinstance(last, str):
            whole[-1] = last + piece
        else:
            whole.append(piece)
    return whole


# Mostly bytes: some of them make characters, most are invalid, and all of that must come out as in one go.
@settings(max_examples=300, deadline=None)
@given(data=st.data(), window=st.integers(1, 8))
def test_texts_join_to_the_text_of_the_whole_answer(data, window, tokenizer, byte_ids) -> None:
    layout = TokenLayout(tokenizer.size, (("image", 4),))
    spelled = st.sampled_from("aé€𝄞 ").map(lambda character: [byte_ids[byte] for byte in character.encode()])
    byte = st.integers(0, 255).map(lambda byte: [byte_ids[byte]])
    piece = st.integers(0, tokenizer.size - 1).map(lambda i: [i])
    begin, end, code = layout.control("image_begin"), layout.control("image_end"), layout.code_range("image").start
    image = st.lists(st.integers(code, code + 3), max_size=3).map(lambda codes: [begin, *codes, end])
    parts = data.draw(st.lists(st.one_of(spelled, byte, piece, image), max_size=30))
    tokens = [token for part in parts for token in part]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "WINDOW", window)
        found = given_by(GrowingAnswer(layout, images(layout), tokenizer.decode), tokens)
    whole = [
        run if isinstance(run, Codes) else tokenizer.decode(run) for run in split_answer(layout, images(layout), tokens)
    ]
    assert joined(found) == [run for run in whole if run != ""]


def test_a_character_of_several_bytes_comes_when_its_last_byte_does(tokenizer, byte_ids) -> None:
    answer = growing(tokenizer)
    comes = [answer.add(byte_ids[byte]) for byte in "é€𝄞".encode()]
    assert comes == [[], ["é"], [], [], ["€"], [], [], [], ["𝄞"]]
    assert answer.end() == []


def test_half_a_character_at_the_end_is_given_as_the_whole_answer_gives_it(tokenizer, byte_ids) -> None:
    answer = growing(tokenizer)
    euro = [byte_ids[byte] for byte in "€".encode()]
    assert given_by(answer, euro[:2]) == [tokenizer.decode(euro[:2])] != ["€"]


def test_bytes_that_are_no_text_are_not_held_back_forever(tokenizer, byte_ids) -> None:
    answer = growing(tokenizer)
    comes = [answer.add(byte_ids[0xFF]) for _ in range(6)]
    assert comes == [[], [], [], ["\ufffd"], ["\ufffd"], ["\ufffd"]]


def test_text_before_an_image_comes_before_the_image_is_drawn(tokenizer, byte_ids) -> None:
    layout = TokenLayout(tokenizer.size, (("image", 4),))
    answer = GrowingAnswer(layout, images(layout), tokenizer.decode)
    answer.add(byte_ids[0xE2])
    assert answer.add(layout.control("image_begin")) == ["\ufffd"]
    assert answer.add(layout.code_range("image").start + 2) == []
    assert answer.add(layout.control("image_end")) == [Codes("image", (2,))]
