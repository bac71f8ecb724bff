"""Two ranks train like one process, also where a rank's whole step has text only, and say nothing odd meanwhile."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from megatron_gemini.config.load import read_config
from megatron_gemini.contracts import RowFormat, TokenLayout
from megatron_gemini.data.loading.loader import Loader
from megatron_gemini.modalities.text.tokenizer import TextTokenizer
from tests.end_to_end.conftest import Start
from tests.end_to_end.dataset import CODES, settings, write_config
from tests.end_to_end.launches import TRAIN
from tests.ranks import run_ranks

STEPS = 8
LAUNCHERS = ("alone", "deepspeed", "torchrun")
# What DeepSpeed's and torch's launchers say of themselves, and then the trainer.
KNOWN = re.compile(
    r"\[[-\d :,]+\] \[(INFO|WARNING)\] \[(runner|launch)\.py:\d+:\w+\] |"
    r"(attention|loss|optimizer|compiling DeepSpeed's operator|step \d+/\d+|saved|trained \d+ steps)\b"
)


@pytest.fixture(scope="module")
def config(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Much text and little else in short rows, under ZeRO-3."""
    folder = tmp_path_factory.mktemp("ranks")
    sections = settings(data, folder / "run")
    sections["data"]["sources"] = [s for s in sections["data"]["sources"] if s["task"] != "video_caption"]  # too long
    for source in sections["data"]["sources"]:
        source["weight"] = {"text": 12.0, "generate": 0.1}.get(source["task"], 0.5)
    sections["data"] |= {"row_tokens": 64, "look_ahead": 2}
    sections["train"]["steps"] = STEPS
    return write_config(folder / "run.yaml", sections)


@pytest.fixture(scope="module")
def runs(start: Start, config: Path) -> dict[str, tuple[str, list[float]]]:
    """(output, losses) by launcher, and of two tensor-parallel ranks."""
    found = {}
    for kind in LAUNCHERS:
        launch = start(kind, "--config", config, "--train.output_dir", config.parent / kind)
        assert launch.wait() == 0, launch.output
        found[kind] = (launch.output, losses(config.parent / kind))
    given = ("--config", config, "--train.output_dir", config.parent / "tensor", "--parallel.tensor", "2")
    ended = run_ranks(TRAIN, 2, *given, "--data.workers", "1", log=config.parent / "tensor.log")
    assert ended.status == 0, ended.output
    return {**found, "tensor": (ended.output, losses(config.parent / "tensor"))}


def losses(output: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (output / "metrics.jsonl").read_text().splitlines()]


def test_a_rank_with_text_only_does_not_hang(runs: dict[str, tuple[str, list[float]]], config: Path) -> None:
    steps = list(zip(media_of_rank(config, 0), media_of_rank(config, 1), strict=True))
    assert any(first and not second for first, second in steps), steps
    assert any(second and not first for first, second in steps), steps
    assert any(not first and not second for first, second in steps), steps
    assert len(runs["deepspeed"][1]) == STEPS


@pytest.mark.parametrize("kind", [*LAUNCHERS[1:], "tensor"])
def test_every_launcher_gives_the_same_losses(kind: str, runs: dict[str, tuple[str, list[float]]]) -> None:
    assert runs[kind][1] == pytest.approx(runs["alone"][1], rel=1e-5, abs=0)


def test_ranks_that_train_on_the_same_rows_read_other_ones(runs: dict[str, object], config: Path) -> None:
    checkpoint = config.parent / "tensor" / "checkpoints" / f"step-{STEPS:08d}"
    lanes = [json.loads((checkpoint / f"rank-{rank:05d}.json").read_text())["data"] for rank in range(2)]
    assert [set(each) for each in lanes] == [{"0", "2"}, {"1", "3"}]
    assert all(lane["read"] > 0 for each in lanes for lane in each.values())


@pytest.mark.parametrize("kind", LAUNCHERS)
def test_a_run_says_nothing_odd(kind: str, runs: dict[str, tuple[str, list[float]]]) -> None:
    odd = [line for line in runs[kind][0].splitlines() if line.strip() and not KNOWN.match(line)]
    assert not odd


def media_of_rank(path: Path, rank: int) -> list[set[str]]:
    """The encoders that have something to do in each step of one of two ranks."""
    config = read_config(path)
    tokenizer = TextTokenizer(config.data.text_model)
    layout = TokenLayout(tokenizer.size, (("image", CODES),))
    with Loader(config, rank, 2, layout, tokenizer, RowFormat()) as loader:
        return [{name for batch in loader.next().values() for name in batch.media} for _ in range(STEPS)]
