"""The quickstart's shards: real, separate by sample and by voice, reproducible, and usable by every task."""

import importlib.util
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import sentencepiece

from megatron_gemini.config.data import SourceConfig
from megatron_gemini.config.run import RunConfig
from megatron_gemini.data.samples.decode import SampleDecoder
from megatron_gemini.data.sources.paths import expand_shards
from megatron_gemini.data.sources.schema import Schema
from megatron_gemini.data.sources.shards import Shards
from tests.tiny_shards import add

pytest.importorskip("espeakng_loader")
TOOLS = Path(__file__).parents[3] / "tools"
SIDES = ("train", "validation")


def tool(name):
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


digits, speech, train_sentencepiece = map(tool, ("build_digits", "build_speech", "train_sentencepiece"))
DIGITS = ("--clips", "12", "3", "--documents", "5", "2")
SPEECH = ("--accents", "1", "--takes", "1", "1")


def build(out):
    assert digits.main(["--out", str(out), *DIGITS]) == 0
    assert speech.main(["--out", str(out), *SPEECH]) == 0


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    out = tmp_path_factory.mktemp("data")
    build(out)
    return out


def every_member(out, name, side, endings):
    shards = Shards(expand_shards(f"{out}/{side}/{name}-*.tar"))
    return [shards.read(i, endings) for i in range(len(shards))]


@pytest.mark.parametrize(
    ("task", "name", "train", "validation"),
    [
        ("caption", "digits", 1400, 397),
        ("transcribe", "speech", 280, 50),
        ("video_caption", "clips", 12, 3),
        ("interleave", "interleave", 5, 2),
    ],
)
def test_every_sample_can_be_decoded_for_its_task(built, task, name, train, validation):
    decoder, schema = SampleDecoder(RunConfig()), Schema.of(SourceConfig(shards="x", task=task))
    for side, count in zip(SIDES, (train, validation), strict=True):
        shards = Shards(expand_shards(f"{built}/{side}/{name}-*.tar"))
        assert len(shards) == count
        for i in range(0, count, 1 + count // 40):
            decoder.decode(shards.read(i, shards.endings(i)), shards.key(i), schema)


def test_captions_say_what_the_labels_say(built):
    for members in every_member(built, "digits", "validation", ("txt", "json")):
        assert members["txt"].decode().split()[1] == digits.WORDS[json.loads(members["json"])["label"]]
    for members in every_member(built, "clips", "train", ("txt", "json")):
        words = members["txt"].decode().replace(",", "").split()
        labels = json.loads(members["json"])["labels"]
        assert [word for word in words if word in digits.WORDS] == [digits.WORDS[label] for label in labels]


def test_no_digit_and_no_voice_is_on_both_sides(built):
    found: dict[str, dict[str, set]] = {side: {"digits": set(), "voices": set()} for side in SIDES}
    for side in SIDES:
        for name in ("digits", "clips", "interleave", "speech", *(["varied"] if side == "train" else [])):
            for members in every_member(built, name, side, ("json",)):
                metadata = json.loads(members["json"])
                places = metadata["sklearn_index"]
                found[side]["digits"].update(places if isinstance(places, list) else [places])
                found[side]["voices"] |= {metadata["voice"]} if name == "speech" else set()
    split = {kind: json.loads((built / f"{kind}.split.json").read_text()) for kind in ("digits", "speech")}
    for side in SIDES:
        assert found[side]["digits"] == set(split["digits"][side]["sklearn_indices"])
        assert found[side]["voices"] == set(split["speech"][side]["voices"])
    assert not found["train"]["digits"] & found["validation"]["digits"]
    assert not found["train"]["voices"] & found["validation"]["voices"]
    assert len(found["train"]["digits"] | found["validation"]["digits"]) == 1797
    assert len(found["train"]["voices"]) >= 20


def test_spoken_and_drawn_digits_are_the_same(built):
    for side in SIDES:
        labels = {
            m["png"]: json.loads(m["json"])["label"] for m in every_member(built, "digits", side, ("png", "json"))
        }
        for members in every_member(built, "speech", side, ("png", "txt", "json")):
            label = json.loads(members["json"])["label"]
            assert labels[members["png"]] == label
            assert members["txt"].decode() == speech.WORDS[label]


def test_building_again_elsewhere_gives_the_same_bytes(built, tmp_path):
    # In a process of its own: eSpeak NG's random numbers go on from one build to the next in the same process.
    for name, options in (("build_digits", DIGITS), ("build_speech", SPEECH)):
        command = [sys.executable, str(TOOLS / f"{name}.py"), "--out", str(tmp_path), *options]
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    files = sorted(path.relative_to(built) for path in built.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
    assert all((built / path).read_bytes() == (tmp_path / path).read_bytes() for path in files)


def test_a_finished_build_is_reused_until_options_or_shards_change(tmp_path, capsys):
    def run(*options):
        assert digits.main(["--out", str(tmp_path), "--clips", "2", "1", "--documents", "1", "1", *options]) == 0
        return "built before" in capsys.readouterr().out

    assert [run(), run(), run("--seed", "1"), run(), run()] == [False, True, False, False, True]
    shard = tmp_path / "validation" / "digits-000.tar"
    shard.write_bytes(shard.read_bytes().replace(b"an eight", b"a seven!", 1))
    assert [run(), run()] == [False, True]
    shard.unlink()
    assert [run(), run()] == [False, True]
    assert not run("--variants", "0")
    assert not list(tmp_path.glob("*/varied-*"))
    assert not run()
    with tarfile.open(shard, "a") as tar:  # as tools/encode_images.py adds them
        add(tar, "digit0000.codes.json", b'{"codes": []}')
    assert run()


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        (digits, ["--size", "7"], "--size is 7"),
        (digits, ["--clips", "0", "1"], "--clips is 0 1"),
        (digits, ["--validation", "5"], "--validation is 5"),
        (digits, ["--seed", "-1"], "--seed is -1"),
        (speech, [], "run tools/build_digits.py --out"),
        (speech, ["--accents", "9"], "--accents is 9"),
    ],
)
def test_mistakes_are_one_line_and_status_two(module, arguments, message, tmp_path, capsys):
    assert module.main(["--out", str(tmp_path), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def train_text(capsys, *arguments):
    status = train_sentencepiece.main([str(argument) for argument in arguments])
    return status, capsys.readouterr()


def test_the_text_model_writes_every_caption_and_prompt_without_bytes(built, tmp_path, capsys):
    out = tmp_path / "text.model"
    assert train_text(capsys, "--shards", f"{built}/train/*.tar", "--out", out)[0] == 0
    model = sentencepiece.SentencePieceProcessor(model_file=str(out))
    for text in ("draw a seven", "an eight", "what was said?", "What is this?", "a three, a one and a four"):
        ids = model.EncodeAsIds(text)
        assert not any(model.IsByte(i) or model.IsUnknown(i) for i in ids)
        assert model.DecodeIds(ids) == text
    assert model.DecodeIds(model.EncodeAsIds("Ünïcode  twice\n")) == "Ünïcode  twice\n"
    again = tmp_path / "again.model"
    train_text(capsys, "--shards", f"{built}/train/*.tar", "--out", again)
    assert again.read_bytes() == out.read_bytes()


def test_a_run_config_names_sources_prompts_and_model(built, tmp_path, capsys):
    source = {"task": "caption", "shards": f"{built}/train/digits-*.tar", "prompts": ["quo vadis?"]}
    config = tmp_path / "run.yaml"
    config.write_text(json.dumps({"data": {"sources": [source], "text_model": str(tmp_path / "named.model")}}))
    assert train_text(capsys, "--config", config)[0] == 0
    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "named.model"))
    assert not any(model.IsByte(i) for i in model.EncodeAsIds("quo vadis?"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--vocab-size", "5000"], "pieces; choose "),
        (["--vocab-size", "258"], "characters alone take"),
        (["--vocab-size", "9"], "--vocab-size is 9"),
        (["--samples", "0"], "--samples is 0"),
        (["--character-coverage", "2"], "--character-coverage is 2"),
    ],
)
def test_a_vocabulary_that_cannot_be_says_which_can(built, tmp_path, capsys, arguments, message):
    shards = f"{built}/train/digits-*.tar"
    status, told = train_text(capsys, "--shards", shards, "--out", tmp_path / "text.model", *arguments)
    assert status == 2
    assert message in told.err
    assert told.err.count("\n") == 1
    assert not (tmp_path / "text.model").exists()


@pytest.mark.parametrize("name", ["build_digits", "build_speech", "train_sentencepiece"])
def test_help_works_from_any_folder(name, tmp_path):
    command = [sys.executable, str(TOOLS / f"{name}.py"), "--help"]
    told = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert "default:" in told
