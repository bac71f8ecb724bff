"""The command: at once, without torch, a table that says why, files, one line for a mistake, and the dry run."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_gemini import cli
from megatron_gemini.config.load import read_config
from megatron_gemini.planning.dry_run import _checked
from tests.cpu_time import children_use_less_than

ROOT = Path(__file__).parents[3]
SMALL = [
    *("plan", "--preset", "1b", "--data.row_tokens", "4096", "--train.rows_per_step", "64", "--data.lanes", "64"),
    *("--engine.precision", "bf16"),
]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megatron_gemini.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def test_the_best_layout_is_told_with_its_reasons_and_written(tmp_path, capsys):
    out = tmp_path / "plan.yaml"
    assert cli.main([*SMALL, "--gpus", "8", "--gpu_memory", "24GB", "--host_memory", "256GB", "--out", str(out)]) == 0
    told = capsys.readouterr().out
    assert "8 H100 of 24.0 GB" in told
    assert re.search(r"^tp +sp +cp +pp .* MFU +rows/s$", told, re.MULTILINE)
    for piece in ("best: --parallel.tensor", "what binds:", "to spare", "a step of", "with engine.zero_stage"):
        assert piece in told
    assert f"wrote {out} and {tmp_path / 'plan.json'}" in told
    config = read_config(out)
    best = re.search(r"best: .*--engine.zero_stage (\d).*--engine.recompute (\w+)", told)
    assert best and (str(config.engine.zero_stage), config.engine.recompute) == best.groups()


def test_no_torch_is_imported_for_a_plan_or_for_help():
    code = (
        "import sys; from megatron_gemini import cli\n"
        f"assert cli.main({[*SMALL, '--gpus', '8']!r}) == 0\n"
        "try: cli.main(['plan', '--help'])\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "print(sorted({'torch', 'numpy', 'deepspeed', 'megatron.core'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.stdout.endswith("\n[]\n"), result.stderr
    assert "--gpu_memory SIZE" in result.stdout


def test_a_clip_that_would_not_fit_is_warned_of(capsys):
    """The longest one that a row can hold: 131,072 patches at once in a ViT-g."""
    long_rows = ["plan", "--preset", "8b", "--data.row_tokens", "131072", "--train.rows_per_step", "8", "--gpus", "32"]
    arguments = [*long_rows, "--data.lanes", "8", "--engine.precision", "bf16"]
    assert cli.main(arguments) == 0
    assert "mind: an item of 131,072 inputs, which the limits of encoders.vision allow" in capsys.readouterr().out
    assert cli.main([*arguments, "--encoders.vision.max_frames", "4"]) == 0
    assert "mind:" not in capsys.readouterr().out


def test_where_nothing_fits_the_table_says_by_how_much_and_the_status_is_2(capsys):
    assert cli.main([*SMALL, "--gpus", "1", "--gpu_memory", "8GB"]) == 2
    told = capsys.readouterr()
    assert re.search(r"lacks \d+\.\d [GM]B a GPU", told.out)
    assert "no layout fits; the nearest lacks" in told.err


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--gpus", "8", "--gpu_memory", "80 apples"], "--gpu_memory is '80 apples'; write a size such as 80GB"),
        (["--gpus", "0"], "--gpus is 0; it must be 1 or more"),
        ([], "--gpus is None"),
        (["--gpus", "8", "--gpu", "v100"], "invalid choice: 'v100'"),
        (["--gpus", "8", "--modle.width", "3"], "--modle.width is no setting; did you mean --model.width?"),
        (["--gpus", "8", "--out", "plan.json"], "--out is 'plan.json'; name a .yaml file"),
        (["--gpus", "8", "--objective.kind", "image_tokenizer"], "objective.kind is image_tokenizer"),
        (["--gpus", "7", "--train.rows_per_step", "3", "--data.lanes", "3"], "no layout of 7 GPUs is legal"),
        (["--dry_run_rank", "3"], "--dry_run_rank and --world belong together"),
        (["--dry_run_rank", "8", "--world", "8"], "--dry_run_rank is 8; a world of 8 has 0 to 7"),
        (["--dry_run_rank", "0", "--world", "6", "--parallel.tensor", "4"], "does not divide the 6 ranks"),
    ],
)
def test_a_mistake_is_one_line(arguments, problem, capsys):
    assert cli.main(["plan", *arguments]) == 2
    told = capsys.readouterr()
    assert problem in told.err and told.err.count("\n") == 1
    assert told.out == ""


def test_one_rank_of_1024_is_built_on_one_machine_in_seconds_and_little_memory():
    program = (
        "import sys; from megatron_gemini import cli; from megatron_gemini.training import throughput\n"
        "status = cli.main(sys.argv[1:])\n"
        "print('peak', throughput.peak_memory_bytes() >> 20, 'MiB'); sys.exit(status)"
    )
    arguments = [
        *("plan", "--preset", "70b", "--dry_run_rank", "517", "--world", "1024", "--engine.precision", "bf16"),
        *("--parallel.tensor", "8", "--parallel.pipeline", "16", "--parallel.virtual_stages", "2"),
        *("--parallel.schedule", "interleaved", "--train.rows_per_step", "1024", "--data.lanes", "1024"),
    ]
    with children_use_less_than(90):
        result = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for line in (
        "rank 517 of 1024",
        "  tensor    5 of 8  ranks 512, 513, 514, 515, 516, 517, 518, 519",
        "  pipeline  8 of 16  ranks 5, 69, 133, ..., 965",
        "  data      0 of 8  ranks 517, 525, 533, 541, 549, 557, 565, 573",
    ):
        assert line in result.stdout
    assert len(re.findall(r"stage (8|24): layers .* parameters, as planned", result.stdout)) == 2
    assert int(re.search(r"peak (\d+) MiB", result.stdout)[1]) < 1024


def test_formulas_that_are_out_of_date_are_told():
    assert _checked(7, 7, "stage 0") == "7 parameters, as planned"
    with pytest.raises(RuntimeError, match="stage 0 has 8 parameters, but planning counts 7"):
        _checked(8, 7, "stage 0")
