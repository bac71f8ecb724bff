"""`megatron-gemini evaluate` on small shards of every task, and one line for every mistake."""

import json
import re
import subprocess
import sys
from pathlib import Path

import PIL.Image
import pytest

from megatron_gemini.checkpoint.directory import resolve
from megatron_gemini.checkpoint.index import RunId
from megatron_gemini.cli import run_command
from megatron_gemini.evaluate import default_out, evaluate_command, main
from megatron_gemini.registry import METRICS
from tests.cpu_time import children_use_less_than
from tests.digit_run import TASKS, write_run
from tests.extension.first_word import FIRST_WORD
from tests.tiny_checkpoint import write_checkpoint
from tests.unit.checkpoint.test_directory import save


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def report(run) -> dict:
    argv = ["--checkpoint", str(run), "--images", "20", "--samples", "50", "--disjoint", "index", "voice"]
    assert main(argv) == 0
    return json.loads((run / "report.json").read_text())


def test_the_report_holds_every_figure(report) -> None:
    shares = (
        *("caption_exact_match", "transcribe_exact_match", "video_caption_exact_match", "interleave_exact_match"),
        *("generate_copies", "speech_to_image_copies", "validation_copies", "training_code_usage"),
    )
    for name in shares:
        assert 0 <= report[name] <= 1, name
    for task in ("caption", "transcribe", "video_caption", "interleave"):
        assert report[f"{task}_cer"] > 0 and report[f"{task}_wer"] > 0
    assert report["generate_diversity"] > 0 and report["reconstruction_psnr"] > 0
    assert -1 <= report["reconstruction_ssim"] < 1
    assert report["images_asked"] == {"generate": 20, "speech_to_image": 14}
    assert 0 < report["images_drawn"]["generate"] <= 20
    assert report["train_seconds"] == 65.0 and report["tokens_per_second"] == 9.0
    assert report["first_losses"] == [5.0, 4.0, 3.0]
    assert report["validation_samples"] == {task: 50 if name == "digits" else 12 for task, name in TASKS.items()}


def test_an_evaluation_writes_nothing_into_a_checkpoint(tmp_path) -> None:
    """Which lists its files, and would be called damaged from then on."""
    run_id = RunId()
    step = save(tmp_path, 3, run_id)
    assert default_out(tmp_path) == tmp_path / "report.json"
    assert default_out(step) == step.with_name("step-00000003.evaluation") / "report.json"
    with pytest.raises(ValueError, match="is a checkpoint, which another file would damage"):
        evaluate_command(["--checkpoint", str(step), "--out", str(step / "report.json")])
    default_out(step).parent.mkdir()
    save(tmp_path, 4, run_id, keep=1)
    assert resolve(tmp_path).name == "step-00000004"


def test_a_random_model_scores_like_one(report) -> None:
    assert report["caption_exact_match"] < 0.5 and report["generate_copies"] < 0.5


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
    assert "caption_exact_match" in report and "transcribe_exact_match" not in report
    assert not report["validation"]["separate"] and report["validation"]["shared_media"] == 200
    assert "warning: training and validation shards share content" in capsys.readouterr().err


def test_named_metrics_alone_are_computed_and_shown(run, tmp_path, capsys) -> None:
    argv = ["--checkpoint", str(run), "--validation", f"caption={run}/validation/digits.tar", "--samples", "5"]
    assert main([*argv, "--metrics", "cer", "psnr", "--out", str(tmp_path / "few.json")]) == 0
    report = json.loads((tmp_path / "few.json").read_text())
    assert {"caption_cer", "reconstruction_psnr"} <= report.keys()
    assert not {"caption_exact_match", "reconstruction_ssim", "validation_copies"} & report.keys()
    shown = capsys.readouterr().out
    assert re.search(r"caption_cer +[\d.]+%  lower is better\n", shown)
    assert re.search(r"reconstruction_psnr +[\d.]+ dB  higher is better\n", shown)


def test_a_metric_of_a_plugin_is_computed_by_its_name(run, tmp_path, capsys) -> None:
    METRICS.register("first_word", FIRST_WORD)
    try:
        argv = ["--checkpoint", str(run), "--validation", f"caption={run}/validation/digits.tar", "--samples", "5"]
        assert main([*argv, "--metrics", "first_word", "--out", str(tmp_path / "one.json")]) == 0
    finally:
        METRICS.unregister("first_word")
    report = json.loads((tmp_path / "one.json").read_text())
    assert 0 <= report["caption_first_word"] <= 1 and "caption_exact_match" not in report
    assert re.search(r"caption_first_word +[\d.]+%  higher is better\n", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--metrics", "exact_mach"], "'exact_mach' is no metric; did you mean exact_match?"),
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
        "finally:\n    assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    with children_use_less_than(1.0):
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--validation" in result.stdout and "default: 200" in result.stdout


def test_drawings_that_a_model_cannot_make_are_counted_and_told(run, tmp_path, capsys) -> None:
    """Of a run that was not given the tokenizer of its image codes."""
    write_checkpoint(tmp_path, 1, seed=1, draws=False)
    argv = ["--checkpoint", str(tmp_path), "--samples", "5", "--images", "3"]
    sources = [f"{task}={run}/validation/digits.tar" for task in ("caption", "generate")]
    argv += [word for source in sources for word in ("--validation", source)]
    assert run_command(main, argv) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["images_not_asked"] == {"generate": 5} and "caption_cer" in report
    assert "warning: generate: 5 drawings were not asked for; this model cannot draw\n" in capsys.readouterr().err


def test_a_run_without_losses_to_draw_is_evaluated_all_the_same(run, tmp_path, capsys) -> None:
    write_checkpoint(tmp_path, 1, seed=1)
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "learning_rate": 0.1}\n')
    sources = ["--validation", f"caption={run}/validation/digits.tar"]
    assert run_command(main, ["--checkpoint", str(tmp_path), "--samples", "2", "--metrics", "cer", *sources]) == 0
    said = capsys.readouterr()
    assert "holds no record of a loss" in said.err and "loss.png" not in said.out
