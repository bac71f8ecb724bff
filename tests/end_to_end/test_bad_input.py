"""A mistake of the user's is one line that names the thing and the way out, with status 2 and no traceback."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from megatron_gemini.training.run_lock import RunLock
from tests.end_to_end.conftest import Start, run_commands
from tests.end_to_end.dataset import settings, write_config, write_tar
from tests.ranks import Ended

# (arguments, what the line says); {folder} holds the files that `mistakes` writes
CASES: dict[str, tuple[list[str], str]] = {
    "unknown option": (["--model.widht", "8"], r"--model\.widht is no setting; did you mean --model\.width\?"),
    "no number": (["--train.steps", "many"], r"--train\.steps is 'many'; it must be a whole number"),
    "out of range": (["--train.steps", "0"], r"train\.steps is 0; it must be greater than 0"),
    "heads": (["--model.heads", "3", "--parallel.tensor", "2"], r"parallel\.tensor is 2.*model\.heads \(3\)"),
    "no configuration": (["--config", "{folder}/absent.yaml"], r"cannot read the configuration .*absent\.yaml"),
    "no text model": (["--data.text_model", "{folder}/absent.model"], r"absent\.model"),
    "corrupt text model": (["--data.text_model", "{folder}/corrupt.model"], r"corrupt\.model"),
    "no shards": (["--data.sources.0.shards", "{folder}/absent-*.tar"], r"no shard matches .*absent-\*\.tar"),
    "empty file": (["--data.sources.0.shards", "{folder}/empty.tar"], r"empty\.tar' holds no usable sample"),
    "empty tar": (["--data.sources.0.shards", "{folder}/none.tar"], r"none\.tar' holds no usable sample"),
    "all bad": (["--data.sources.0.shards", "{folder}/bad.tar"], r"no sample of .*bad\.tar' can be used for caption"),
    "no JSON": (["--deepspeed_config", "{folder}/absent.json"], r"deepspeed_config .*absent\.json cannot be read"),
    "broken JSON": (["--deepspeed_config", "{folder}/broken.json"], r"broken\.json cannot be read as JSON"),
    "JSON against": (
        ["--deepspeed_config", "{folder}/stage.json"],
        r"stage\.json sets zero_optimization\.stage to 1, the run's configuration gives 3; make them equal",
    ),
    "file in the way": (["--train.output_dir", "{folder}/broken.json"], r"broken\.json"),
    "another model": (
        ["--train.output_dir", "{folder}/run", "--model.width", "64"],
        r"step-00000004 was trained with model\.width \d+, which is 64 now; set it back",
    ),
    "another order": (
        ["--train.output_dir", "{folder}/run", "--train.seed", "9"],
        r"step-00000004 was trained with train\.seed \d+, which is 9 now; set it back",
    ),
    "folder in use": (["--train.output_dir", "{folder}/in_use"], r"in_use is in use by process \d+ on \S+; wait until"),
    "index gone": (
        ["--train.output_dir", "{folder}/gone"],
        r"names step-00000004, which has no index\.json; .*step-00000002 is not complete .*--train\.no_resume",
    ),
    "another batch": (["--train.output_dir", "{folder}/run", "--train.rows_per_step", "5"], r"train\.rows_per_step"),
    "other lanes": (
        ["--train.output_dir", "{folder}/run", "--data.lanes", "2"],
        r"was trained with data\.lanes 4, which is 2 now; set it back",
    ),
    "other data": (
        ["--train.output_dir", "{folder}/run", "--data.sources.0.shards", "{folder}/good.tar"],
        r"the data sources have changed",
    ),
    "damaged": (
        ["--train.output_dir", "{folder}/damaged"],
        r"rank-00000\.safetensors is not what was saved .*; step-00000002 beside it is complete: "
        r"delete .*step-00000004 to take that",
    ),
    "nothing to begin with": (
        ["--config", "{folder}/weights.yaml", "--init_from.0.checkpoint", "{folder}/absent"],
        r"checkpoint .*absent does not exist",
    ),
    "damaged beginning": (
        ["--config", "{folder}/weights.yaml", "--init_from.0.checkpoint", "{folder}/damaged"],
        r"rank-00000\.safetensors is not what was saved",
    ),
    "no such module": (
        ["--config", "{folder}/weights.yaml", "--init_from.0.module", "encoders.visoin"],
        r"^init_from\.0 .*: module is encoders\.visoin, and the model has no parameter below it; .* encoders\.vision",
    ),
    "no such source": (
        ["--config", "{folder}/weights.yaml", "--init_from.0.source", "encoders.eye"],
        r"^init_from\.0 .*: source is encoders\.eye, and .*run has no parameter below it",
    ),
    "another shape": (
        ["--config", "{folder}/weights.yaml", "--encoders.vision.width", "32"],
        r"^init_from\.0 .*: other shapes: encoders\.vision\.\S+ is \(.*\) there and \(.*\) here",
    ),
    "another depth": (
        ["--config", "{folder}/weights.yaml", "--init_from.0.module", "decoder", "--model.layers", "3"],
        r"^init_from\.0 .*: the checkpoint lacks decoder\.layers\.2\..* and \d+ more",
    ),
    "another vocabulary": (
        ["--config", "{folder}/weights.yaml", "--init_from.0.module", "decoder", "--image_tokenizer.codes", "16"],
        r"^init_from\.0 .*: other shapes: decoder\.embedding\.weight .*: the text model, or the number of codes, is",
    ),
    "no index": (["--train.output_dir", "{folder}/no_index"], r"index\.json is not readable"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mistakes")


@pytest.fixture(scope="module")
def config(data: Path, folder: Path) -> Path:
    return write_config(folder / "run.yaml", settings(data, folder / "new"))


@pytest.fixture(scope="module")
def mistakes(data: Path, config: Path, folder: Path) -> dict[str, Ended]:
    """What every case of `CASES` ended with."""
    write_files(data, folder)
    beginning = [{"checkpoint": str(folder / "run"), "module": "encoders.vision"}]
    write_config(folder / "weights.yaml", settings(data, folder / "new") | {"init_from": beginning})
    run = ["--config", config, "--train.output_dir", folder / "run", "--train.steps", 4, "--train.save_every", 2]
    (folder / "first").mkdir()
    (done,) = run_commands([(run, "")], folder / "first")
    assert done.status == 0, done.output
    shutil.copytree(folder / "run", folder / "damaged")
    flip_byte(folder / "damaged" / "checkpoints" / "step-00000004" / "rank-00000.safetensors")
    shutil.copytree(folder / "run", folder / "no_index")
    for index in folder.glob("no_index/checkpoints/*/index.json"):
        index.write_text("{")
    shutil.copytree(folder / "run", folder / "gone")
    for index in folder.glob("gone/checkpoints/*/index.json"):
        index.unlink()
    RunLock(folder / "in_use").take()  # by this process, for as long as the tests run
    arguments = [
        [*(["--config", str(config)] if "--config" not in given else []), "--train.steps", "8", *given]
        for given in ([word.format(folder=folder) for word in words] for words, _ in CASES.values())
    ]
    return dict(zip(CASES, run_commands([(given, "") for given in arguments], folder), strict=True))


def write_files(data: Path, folder: Path) -> None:
    (folder / "corrupt.model").write_bytes((data / "text.model").read_bytes()[:1000])
    (folder / "empty.tar").write_bytes(b"")
    write_tar(folder / "none.tar", {})
    write_tar(folder / "bad.tar", {f"{number}": {"png": b"no image", "txt": b"one"} for number in range(3)})
    good = {"png": _png(), "txt": b"one"}
    write_tar(folder / "good.tar", {"a": good, "b": good})
    (folder / "broken.json").write_text("{")
    (folder / "stage.json").write_text(json.dumps({"zero_optimization": {"stage": 1}}))


def _png() -> bytes:
    import io

    from PIL import Image

    file = io.BytesIO()
    Image.new("L", (8, 8)).save(file, "PNG")
    return file.getvalue()


def flip_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def told(output: str) -> Sequence[str]:
    return re.findall(r"^megatron-gemini: error: (.*)$", output, re.MULTILINE)


@pytest.mark.parametrize("case", CASES)
def test_a_mistake_is_one_line(case: str, mistakes: dict[str, Ended]) -> None:
    ended, expected = mistakes[case], CASES[case][1]
    assert ended.status == 2, ended.output
    assert "Traceback" not in ended.output, ended.output
    assert len(told(ended.output)) == 1, ended.output
    assert re.search(expected, told(ended.output)[0]), ended.output


def test_debug_shows_where_it_came_from(config: Path, tmp_path: Path) -> None:
    arguments = ["--config", config, "--data.text_model", tmp_path / "absent.model", "--debug"]
    (ended,) = run_commands([(arguments, "")], tmp_path)
    assert ended.status == 2
    assert "Traceback" in ended.output
    assert "ValueError" in ended.output


def test_two_ranks_tell_a_mistake_once(start: Start, config: Path) -> None:
    launch = start("deepspeed", "--config", config, "--train.rows_per_step", 3)
    assert launch.wait() == 2, launch.output
    assert told(launch.output) == [
        "train.rows_per_step is 3, which 2 data-parallel ranks does not divide; the nearest that fit: 2 or 4; "
        "nearest that 2 ranks can run: --parallel.tensor 2 (1 data parallel); --parallel.pipeline 2 (1 data parallel); "
        "--parallel.context 2 (1 data parallel)"
    ]
    assert "Traceback" not in launch.output
