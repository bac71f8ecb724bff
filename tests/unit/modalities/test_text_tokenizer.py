"""Text goes to ids and back; a broken model file is a message, not a traceback."""

import io

import pytest
import sentencepiece

from megatron_gemini.modalities.text.tokenizer import TextTokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([f"the digit is {word}" for word in ("one", "two", "three", "seven")] * 20),
        model_writer=file,
        vocab_size=300,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    path = tmp_path_factory.mktemp("text") / "text.model"
    path.write_bytes(file.getvalue())
    return path


def test_text_round_trips_also_outside_the_training_text(model):
    tokenizer = TextTokenizer(model)
    for text in ("the digit is seven", "naïve 日本 🙂", ""):
        ids = tokenizer.encode(text)
        assert all(0 <= i < tokenizer.size for i in ids)
        assert tokenizer.decode(ids) == text


def test_missing_and_corrupt_models_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"gone\.model"):
        TextTokenizer(tmp_path / "gone.model")
    for name, content in (("noise.model", b"\x00noise" * 9), ("empty.model", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=name):
            TextTokenizer(tmp_path / name)


def test_ids_outside_the_model_are_refused(model):
    tokenizer = TextTokenizer(model)
    with pytest.raises(ValueError, match=str(tokenizer.size)):
        tokenizer.decode([tokenizer.size])
