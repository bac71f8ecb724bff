"""The quickstart's judge: its classifier on real digits, drawings made for it, the whole command on small shards."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import PIL.Image
import pytest
from sklearn.datasets import load_digits

from megatron_gemini.cli import run_command
from megatron_gemini.data.samples.items import Text
from megatron_gemini.evaluation.asking import Continued, Drawn
from megatron_gemini.evaluation.sheet import subtitle
from megatron_gemini.evaluation.validation import ValidationExample
from megatron_gemini.generation.api import Drawing
from tests.digit_run import TASKS, write_run

FILE = Path(__file__).resolve().parents[3] / "examples" / "quickstart" / "judge_digits.py"


def load() -> ModuleType:
    """The example by its path: it is a program and in no package."""
    spec = importlib.util.spec_from_file_location("judge_digits", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


EXAMPLE = load()
Classifier = EXAMPLE.Classifier


def digits() -> tuple[list[np.ndarray], list[str]]:
    """Real digits as 16 x 16 RGB images."""
    data = load_digits()
    grey = np.round(data.images * 255 / 16).astype(np.uint8).repeat(2, axis=1).repeat(2, axis=2)
    return [np.repeat(image[..., None], 3, axis=2) for image in grey], [str(label) for label in data.target]


def grey(value: int) -> np.ndarray:
    return np.full((8, 8, 3), value, np.uint8)


def drawing(value: int) -> Drawing:
    return Drawing((value,), grey(value))


def example(label: str) -> ValidationExample:
    return ValidationExample(label, [Text(label)], None, label, label)


DARK_AND_LIGHT = Classifier([grey(v) for v in (0, 10, 20, 200, 210, 220)], ["dark"] * 3 + ["light"] * 3)


def test_the_classifier_knows_validation_digits() -> None:
    images, labels = digits()
    classifier = Classifier(images[::2], labels[::2])
    assert classifier.accuracy(images[1::2], labels[1::2]) >= 0.98
    assert classifier.classes == [str(i) for i in range(10)]


def test_the_classifier_does_not_recognize_noise() -> None:
    images, labels = digits()
    classifier = Classifier(images[:600], labels[:600])
    noise = np.random.default_rng(0).integers(0, 255, (200, 16, 16, 3), dtype=np.uint8)
    assert classifier.accuracy(list(noise), labels[:200]) < 0.4


def test_one_class_is_no_classification() -> None:
    with pytest.raises(ValueError, match="2 classes or more"):
        Classifier([np.zeros((8, 8, 3), np.uint8)] * 3, ["a"] * 3)


def test_recognized_counts_wrong_and_missing_images() -> None:
    labels = ["dark", "light", "light", "dark"]
    drawn = Drawn([example(label) for label in labels], [drawing(3), drawing(230), drawing(4), None])
    assert EXAMPLE.recognized(drawn, DARK_AND_LIGHT) == 0.5


@pytest.mark.parametrize(
    ("added", "right", "good"),
    [
        ("One.", "one", True),
        ("two", "one", False),
        (None, "one", False),
        (drawing(3), "one", False),
        ("one", drawing(3), False),
        (None, drawing(3), False),
        (drawing(8), drawing(3), True),
        (drawing(220), drawing(3), False),
    ],
)
def test_a_document_goes_on_as_it_should(added, right, good: bool) -> None:
    assert EXAMPLE.continues(Continued(example("a"), added, right), DARK_AND_LIGHT) == good


def test_the_sheet_names_the_quickstarts_main_figures() -> None:
    report = {"caption_exact_match": 0.976, "transcribe_exact_match": None, "train_seconds": 372.4}
    assert (
        subtitle(report, EXAMPLE.PHRASES) == "images described 98%  ·  trained in 6 min 12 s  ·  all on validation data"
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def report(run) -> dict:
    argv = ["--checkpoint", str(run), "--images", "20", "--samples", "50", "--disjoint", "index", "voice"]
    assert EXAMPLE.main(argv) == 0
    return json.loads((run / "report.json").read_text())


def test_the_report_holds_the_judges_figures_and_the_general_ones(report) -> None:
    shares = (
        *("caption_exact_match", "transcribe_exact_match", "video_caption_exact_match", "interleave_exact_match"),
        *("image_recognized", "speech_to_image_recognized", "reconstruction_recognized", "interleave_accuracy"),
        *("generate_copies", "validation_copies", "training_code_usage"),
    )
    for name in shares:
        assert 0 <= report[name] <= 1, name
    assert report["classifier_accuracy"] > 0.8  # of 200 digits
    assert report["images_asked"] == {"generate": 20, "speech_to_image": 14}
    assert set(report["validation_samples"]) == set(TASKS)


def test_a_random_model_scores_like_one(report) -> None:
    assert report["caption_exact_match"] < 0.5 and report["image_recognized"] < 0.5


def test_the_sheet_is_drawn_beside_the_report(run, report) -> None:
    assert PIL.Image.open(run / "samples.png").width == 1600


def test_a_mistake_is_told_in_one_line_with_status_2(run, capsys) -> None:
    assert run_command(EXAMPLE.main, ["--checkpoint", str(run), "--sample", "3"]) == 2
    error = capsys.readouterr().err
    assert "did you mean --samples?" in error and error.count("\n") == 1


def test_help_is_that_of_the_evaluation() -> None:
    shown = subprocess.run([sys.executable, FILE, "--help"], capture_output=True, text=True, check=True).stdout
    assert "--disjoint" in shown
