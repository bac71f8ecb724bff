"""`megatron-gemini evaluate` on small shards of every task, and one line for every mistake."""

import dataclasses
import io
import json
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import soundfile
from sklearn.datasets import load_digits

from megatron_gemini.cli import run_command
from megatron_gemini.config.data import DataConfig, SourceConfig
from megatron_gemini.evaluate import main
from megatron_gemini.modalities.video.encode import encode_video
from tests.tiny_checkpoint import CONFIG, write_checkpoint

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CODES = json.dumps({"codes": [1, 2, 3, 4]}).encode()
DIGITS = load_digits()


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def image(index: int) -> np.ndarray:
    grey = np.round(DIGITS.images[index] * 255 / 16).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=2)


def png(index: int) -> bytes:
    file = io.BytesIO()
    PIL.Image.fromarray(image(index)).save(file, "png")
    return file.getvalue()


def wav(seed: int) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, np.random.default_rng(seed).normal(size=3000) * 0.1, 16000, format="WAV")
    return file.getvalue()


def write_shards(folder: Path, indices: list[int], voice: str) -> None:
    """One tar a task, of real digits and noise for speech."""
    digits: dict[str, bytes] = {}
    speech: dict[str, bytes] = {}
    clips: dict[str, bytes] = {}
    mixed: dict[str, bytes] = {}
    for i in indices:
        name, origin = WORDS[DIGITS.target[i]].encode(), json.dumps({"index": i}).encode()
        digits |= {f"{i}.png": png(i), f"{i}.txt": name, f"{i}.json": origin, f"{i}.codes.json": CODES}
    for i in indices[:12]:
        word, told = WORDS[DIGITS.target[i]], json.dumps({"voice": voice}).encode()
        speech |= {f"{i}.wav": wav(i), f"{i}.txt": word.encode(), f"{i}.codes.json": CODES, f"{i}.json": told}
        clip = np.stack([image(i), image(i + 1)])
        clips |= {f"{i}.mp4": encode_video(clip, 2.0), f"{i}.txt": word.encode()}
        items: list[dict[str, str]] = [{"text": word}, {"image": "0.png"}, {"codes": "0.codes.json"}]
        items += [{"text": "one"}] if i % 2 else []
        mixed |= {f"{i}.json": json.dumps({"items": items}).encode(), f"{i}.0.png": png(i), f"{i}.0.codes.json": CODES}
    for shard, members in (("digits", digits), ("speech", speech), ("clips", clips), ("mixed", mixed)):
        write_tar(folder / f"{shard}.tar", members)


TASKS: dict[Any, str] = {
    "caption": "digits",
    "generate": "digits",
    "transcribe": "speech",
    "speech_to_image": "speech",
    "video_caption": "clips",
    "interleave": "mixed",
}


def sources(folder: Path) -> tuple[SourceConfig, ...]:
    return tuple(SourceConfig(shards=f"{folder}/{name}.tar", task=task) for task, name in TASKS.items())


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run directory with the shards that its checkpoint's configuration names."""
    run = tmp_path_factory.mktemp("run")
    write_shards(run / "train", list(range(200)), "anna")
    write_shards(run / "validation", list(range(200, 250)), "bert")
    data = DataConfig(sources=sources(run / "train"), validation=sources(run / "validation"))
    write_checkpoint(run, 1, seed=1, config=dataclasses.replace(CONFIG, data=data))
    (run / "summary.json").write_text(json.dumps({"train_seconds": 65.0, "tokens_per_second": 9.0}))
    (run / "metrics.jsonl").write_text("".join(f'{{"step": {i}, "loss": {5 - i}}}\n' for i in range(3)))
    return run


@pytest.fixture(scope="module")
def report(run) -> dict:
    argv = ["--checkpoint", str(run), "--images", "20", "--samples", "50", "--disjoint", "index", "voice"]
    assert main(argv) == 0
    return json.loads((run / "report.json").read_text())


def test_the_report_holds_every_figure(report) -> None:
    shares = (
        *("caption_accuracy", "speech_accuracy", "video_accuracy", "image_recognized", "speech_to_image_recognized"),
        *("interleave_accuracy", "image_copied", "image_copied_validation", "code_usage", "reconstruction_recognized"),
    )
    for name in shares:
        assert 0 <= report[name] <= 1, name
    assert report["classifier_accuracy"] > 0.8  # of 200 digits
    assert report["reconstruction_psnr"] > 0
    assert report["images_drawn"] == 20
    assert report["train_seconds"] == 65.0 and report["tokens_per_second"] == 9.0
    assert report["first_losses"] == [5.0, 4.0, 3.0]
    assert report["validation_samples"] == {task: 50 if name == "digits" else 12 for task, name in TASKS.items()}


def test_a_random_model_scores_like_one(report) -> None:
    assert report["caption_accuracy"] < 0.5 and report["image_recognized"] < 0.5


def test_separate_shards_are_found_separate(report) -> None:
    validation = report["validation"]
    assert validation["separate"] and validation["shared_media"] == 0
    assert validation["fields"]["index"] == {"training": 200, "validation": 50, "shared": 0}
    assert validation["fields"]["voice"] == {"training": 1, "validation": 1, "shared": 0}


def test_pictures_are_drawn_beside_the_report(run, report) -> None:
    assert PIL.Image.open(run / "samples.png").width == 1600
    assert PIL.Image.open(run / "loss.png").width > 0


def test_evaluating_on_the_training_shards_warns(run, tmp_path, capsys) -> None:
    out = tmp_path / "other.json"
    validation = f"caption={run}/train/digits.tar"
    argv = ["--checkpoint", str(run), "--validation", validation, "--samples", "5", "--images", "10", "--out", str(out)]
    assert main(argv) == 0
    report = json.loads(out.read_text())
    assert "caption_accuracy" in report and "speech_accuracy" not in report
    assert not report["validation"]["separate"] and report["validation"]["shared_media"] == 200
    assert "warning: training and validation shards share content" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--validation", "caption"], "'caption' is not TASK=SHARDS"),
        (["--validation", "smell=x.tar"], "'smell=x.tar' is not TASK=SHARDS"),
        (["--validation", "caption=/no/such.tar"], "no shard matches '/no/such.tar'"),
        (["--images", "0"], "--images 0"),
        (["--temperature", "-1"], "temperature is -1"),
        (["--sample", "3"], "no option --sample; did you mean --samples?"),
        (["stray"], "'stray' stands alone"),
        (["--out", "no/such/report.json"], "no/such does not exist"),
    ],
)
def test_a_mistake_is_told_in_one_line_with_status_2(run, capsys, argv, said) -> None:
    assert run_command(main, ["--checkpoint", str(run), *argv]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_a_model_without_validation_data_says_so(tmp_path, capsys) -> None:
    write_checkpoint(tmp_path, 1, seed=1)
    assert run_command(main, ["--checkpoint", str(tmp_path)]) == 2
    assert "name shards by --validation" in capsys.readouterr().err


def test_help_answers_in_under_a_second_without_torch() -> None:
    code = (
        "import sys\nfrom megatron_gemini.evaluate import main\n"
        "try:\n    main(['--help'])\n"
        "finally:\n    assert 'torch' not in sys.modules and 'sklearn' not in sys.modules"
    )
    begin = time.perf_counter()
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert time.perf_counter() - begin < 1.0
    assert "--validation" in result.stdout and "default: 200" in result.stdout
