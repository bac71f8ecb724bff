"""One record never ends a run: whatever a decoder, an operation or a tokenizer raises is that sample's own fault."""

import dataclasses
import json
import math
import sys
from collections import Counter

import pytest

from megatron_gemini.config.data import SourceConfig
from megatron_gemini.config.encoders import AudioConfig
from megatron_gemini.data.loading.loader import Loader
from megatron_gemini.data.operations.spec import OperationSpec
from megatron_gemini.data.samples.captions import captions
from megatron_gemini.data.samples.decode import SampleDecoder
from megatron_gemini.data.samples.decode_json import decode_json
from megatron_gemini.data.sources.columns import Structure, column_bytes
from megatron_gemini.evaluation.validation import read_examples
from megatron_gemini.modalities.bad_sample import BadSample, DataUnreachable, guarded
from megatron_gemini.modalities.text.preprocess import decode_text
from megatron_gemini.modalities.text.tokenizer import TextTokenizer
from megatron_gemini.registry import OPERATIONS
from tests.tiny_checkpoint import train_text_model
from tests.tiny_shards import AUDIO, FORM, LAYOUT, VISION, Characters, chat, run_config, write_tar

HALF = "cut emoji \ud83d"


class Fails(Characters):
    """A tokenizer with an error of its own."""

    def encode(self, text):
        if "fail" in text:
            raise KeyError(text)
        return super().encode(text)


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.model"
    train_text_model(path)
    return TextTokenizer(path)


def turns(question, answer="ok"):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def skipped(config, tokenizer, steps=6):
    with Loader(config, 0, 1, LAYOUT, tokenizer, FORM) as loader:
        for _ in range(steps):
            loader.next()
        return {reason for _, reason in loader.skipped}


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("task", ["chat", "interleave"])
def test_half_an_emoji_is_a_bad_text_with_and_without_workers(tmp_path, pieces, task, workers):
    makes = {"chat": turns, "interleave": lambda text: {"items": [{"text": text}]}}
    records = [makes[task](f"tell {i}") for i in range(4)] + [makes[task](HALF)]
    source = SourceConfig(shards=write_lines(tmp_path / "x.jsonl", records), task=task, name="s")
    config = run_config([source], lanes=1, look_ahead=2, workers=workers, row_tokens=96)
    assert skipped(config, pieces) == {"bad_text"}


def test_half_an_emoji_in_a_file_s_name_or_a_caption_is_a_bad_sample(tmp_path, pieces):
    named = {"items": [{"image": HALF}, {"text": "a"}]}
    records = [{"items": [{"text": "good"}]}, named]
    source = SourceConfig(shards=write_lines(tmp_path / "x.jsonl", records), task="interleave", name="s")
    assert skipped(run_config([source], lanes=1, look_ahead=1, max_bad_share=1.0), pieces) == {"unsafe_name"}
    source = SourceConfig(
        shards=write_lines(tmp_path / "y.jsonl", [{"text": "good"}, {"text": HALF}]), task="text", name="s"
    )
    assert skipped(run_config([source], lanes=1, look_ahead=1, max_bad_share=1.0), pieces) == {"bad_text"}


def test_a_sound_in_a_chat_of_a_model_without_ears_is_a_bad_sample(tmp_path):
    records = [turns("hello"), turns([{"type": "audio", "audio": "a.wav"}])]
    (tmp_path / "a.wav").write_bytes(chat(0)["1.wav"])
    source = SourceConfig(shards=write_lines(tmp_path / "x.jsonl", records), task="chat", name="s")
    config = run_config([source], lanes=1, look_ahead=1)
    deaf = dataclasses.replace(config, encoders={"vision": VISION, "audio": dataclasses.replace(AUDIO, enabled=False)})
    assert isinstance(deaf.encoders["audio"], AudioConfig)
    assert skipped(deaf, Characters()) == {"audio_disabled"}


def test_an_error_of_a_tokenizer_names_the_sample_the_step_and_the_error(tmp_path, caplog, monkeypatch):
    samples = [(f"s{i}", {"txt": b"fail here" if i == 3 else b"good"}) for i in range(6)]
    source = SourceConfig(shards=write_tar(tmp_path / "x.tar", samples), task="text", name="s")
    config = run_config([source], lanes=1, look_ahead=1, max_bad_share=1.0)
    assert skipped(config, Fails(), 12) == {"tokenize_failed"}
    assert "s/s3: tokenize raised KeyError: 'fail here'" in caplog.text
    assert "Traceback" not in caplog.text
    caplog.clear()
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--debug"])
    skipped(config, Fails(), 12)
    assert caplog.text.count("raise KeyError(text)") == 1


@pytest.mark.parametrize("error", [RecursionError(), MemoryError(), AssertionError("no"), OverflowError(), KeyError(1)])
def test_an_error_of_an_operation_is_a_bad_sample_named_by_the_operation(tmp_path, error):
    def breaks(setting):
        def apply(sample, random):
            if sample.fields.text() == "bad":
                raise error
            return sample

        return apply

    OPERATIONS.register("breaks", OperationSpec(breaks))
    try:
        samples = [(f"s{i}", {"txt": b"bad" if i == 2 else b"good"}) for i in range(4)]
        operations = ("decode", "breaks", "format", "tokenize")
        source = SourceConfig(
            shards=write_tar(tmp_path / "x.tar", samples), task="text", name="s", operations=operations
        )
        assert skipped(run_config([source], lanes=1, look_ahead=1), Characters()) == {"breaks_failed"}
    finally:
        OPERATIONS.unregister("breaks")


def test_the_wall_lets_through_what_is_no_sample_s_fault():
    with pytest.raises(DataUnreachable), guarded("decode", "k"):
        raise DataUnreachable("gone")
    with pytest.raises(KeyboardInterrupt), guarded("decode", "k"):
        raise KeyboardInterrupt
    with pytest.raises(BadSample, match=r"^mine$") as found, guarded("decode", "k"):
        raise BadSample("own", "mine")
    assert found.value.reason == "own"


def test_an_evaluation_survives_what_training_does(tmp_path):
    records = [turns("hello"), turns("b", HALF), {"messages": [{"role": "user", "content": HALF}]}]
    source = SourceConfig(shards=write_lines(tmp_path / "x.jsonl", records), task="chat")
    found: Counter[str] = Counter()
    decoder = SampleDecoder(run_config([source]))
    assert [example.key for example in read_examples(source, decoder, 9, 0, found)] == ["x/0"]
    assert found == {"bad_text": 1, "no_answer": 1}


def test_the_number_of_bad_samples_is_that_of_the_list_below_it(tmp_path):
    records = [{"text": "good", "n": i} if i % 2 else {"text": "", "n": i} for i in range(400)]
    shard = write_lines(tmp_path / "x.jsonl", records)
    source = SourceConfig(shards=shard, task="text", name="s", filters=("n < 300",))
    with pytest.raises(ValueError, match="are bad") as error:
        skipped(run_config([source], lanes=1, look_ahead=1), Characters(), 400)
    first, *rows = str(error.value).splitlines()
    assert sum(int(row.split()[-1]) for row in rows) == int(first.split()[0]) > 0
    assert not any("filtered" in row for row in rows)


@pytest.mark.parametrize("data", ["hi there".encode("utf-16-le"), b"a\0b", b"\0\0"])
def test_a_text_with_nul_characters_is_no_text(data):
    with pytest.raises(BadSample, match="NUL characters"):
        decode_text(data)


def test_json_in_another_encoding_is_refused():
    assert decode_json(b"\xef\xbb\xbf[1]") == [1]
    with pytest.raises(BadSample, match="not JSON"):
        decode_json('{"text": "a"}'.encode("utf-16"))


@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_a_number_that_is_not_finite_is_no_caption(value):
    with pytest.raises(BadSample, match="which is no text"):
        captions([("text", Structure(json.dumps(value).encode()))])


@pytest.mark.parametrize("value", [{"path": "a.png", "bytes": None}, {"path": "x.txt"}])
def test_the_name_of_a_file_is_no_caption(value):
    with pytest.raises(BadSample, match=r"text names the file .*, which is no text"):
        captions([("text", column_bytes(value))])
