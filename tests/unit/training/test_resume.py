"""Which checkpoint a run goes on from, what it says of it, and which settings it refuses."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_gemini.checkpoint.directory import step_directory
from megatron_gemini.checkpoint.index import RunId, read_index, seal
from megatron_gemini.checkpoint.inference import save_weights
from megatron_gemini.checkpoint.publish import remove
from megatron_gemini.config.load import dump_config
from megatron_gemini.config.run import RunConfig
from megatron_gemini.modalities.image.code_tokenizer import ImageTokenizer
from megatron_gemini.parallel.parameters import initialize
from megatron_gemini.parallel.topology import Topology
from megatron_gemini.training import resume
from tests.tiny_checkpoint import CONFIG, write_checkpoint
from tests.unit.checkpoint.test_directory import save

ENGINE = SimpleNamespace(topology=Topology.serial(), gather=lambda value: [value])


def test_nothing_there_begins_anew(tmp_path: Path) -> None:
    assert resume.find(ENGINE, tmp_path, True) == (None, [])


def test_a_run_goes_on_from_its_own_newest_without_a_word(tmp_path: Path) -> None:
    first = RunId()
    resume.record_start(tmp_path, first)
    path = save(tmp_path, 3, first)
    assert resume.find(ENGINE, tmp_path, True) == (path, [])
    assert resume.find(ENGINE, tmp_path, False) == (None, [])
    resume.record_start(tmp_path, RunId(parent=first.id))  # went on, and was killed before it saved
    assert resume.find(ENGINE, tmp_path, True) == (path, [])


def test_another_runs_step_is_never_gone_on_from_without_a_word(tmp_path: Path) -> None:
    path = save(tmp_path, 3, RunId())
    resume.record_start(tmp_path, RunId())  # begun anew, and killed before it saved
    found, (line,) = resume.find(ENGINE, tmp_path, True)
    assert found == path
    assert line.startswith("warning: ") and line.endswith("step-00000003 is of another one")


def test_steps_of_another_run_beside_it_are_named(tmp_path: Path) -> None:
    save(tmp_path, 9, RunId())
    path = save(tmp_path, 3, RunId())
    found, (line,) = resume.find(ENGINE, tmp_path, True)
    assert found == path and line.endswith("of another run, which are left alone: step-00000009")


@pytest.mark.parametrize("gone", ["index.json", "."])
def test_the_only_step_that_is_not_complete_is_no_reason_to_begin_at_0(tmp_path: Path, gone: str) -> None:
    path = save(tmp_path, 3, RunId())
    remove(path / gone if gone != "." else path)
    with pytest.raises(
        ValueError, match=r"names step-00000003, which .*put one back, or begin anew by --train\.no_res"
    ):
        resume.find(ENGINE, tmp_path, True)
    assert resume.find(ENGINE, tmp_path, False) == (None, [])


def test_an_older_step_is_taken_with_a_warning(tmp_path: Path) -> None:
    run = RunId()
    older, last = save(tmp_path, 3, run), save(tmp_path, 4, run)
    (last / "index.json").unlink()
    found, (line,) = resume.find(ENGINE, tmp_path, True)
    assert found == older and line.endswith("latest names step-00000004, which has no index.json")


def test_what_a_kill_left_aside_is_put_back_and_told(tmp_path: Path) -> None:
    path = save(tmp_path, 3, RunId())
    path.rename(path.with_name(".step-00000003.tmp"))
    found, (line,) = resume.find(ENGINE, tmp_path, True)
    assert found == path and line.startswith(f"put back {path}")


def test_all_ranks_take_what_rank_0_found(tmp_path: Path) -> None:
    def gather(value: object) -> list[object]:
        return [("path of rank 0", ["told"], ""), value]

    other = SimpleNamespace(topology=dataclasses.replace(Topology.serial(), rank=1, world=2), gather=gather)
    assert resume.find(other, tmp_path, True) == ("path of rank 0", ["told"])
    other.gather = lambda value: [(None, [], "refused"), value]
    with pytest.raises(ValueError, match=r"^refused$"):
        resume.find(other, tmp_path, True)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("run")
    write_checkpoint(run, 2, seed=2)
    directory = step_directory(run, 2)
    state = {"step": 60, "tokens": 5, "seconds": 1.5, "optimizer_steps": 60, "moments_since": {}}
    (directory / "state.json").write_text(json.dumps(state))
    seal(directory)
    return directory


def tokenizer_of(seed: int):
    tokenizer = ImageTokenizer(CONFIG.image_tokenizer)
    initialize(tokenizer, seed)
    return lambda target: save_weights(tokenizer, RunConfig(), target)


def with_(section: str, **values: object) -> RunConfig:
    return dataclasses.replace(CONFIG, **{section: dataclasses.replace(getattr(CONFIG, section), **values)})


def test_the_same_settings_and_assets_say_nothing(made: Path) -> None:
    assets = {"config.yaml": "other text", "text.model": made / "text.model", "image_tokenizer": tokenizer_of(2)}
    assert resume.check_settings(made, CONFIG, assets) == []


def test_another_text_model_is_refused(made: Path, tmp_path: Path) -> None:
    (tmp_path / "other.model").write_bytes((made / "text.model").read_bytes() + b"\n")
    config = with_("data", text_model="other.model")
    with pytest.raises(
        ValueError, match=r"^data\.text_model other\.model is not what .*step-00000002 was trained with"
    ):
        resume.check_settings(made, config, {"text.model": tmp_path / "other.model"})


def test_another_image_tokenizer_is_refused(made: Path) -> None:
    with pytest.raises(ValueError, match=r"^train\.image_tokenizer is not what"):
        resume.check_settings(made, CONFIG, {"image_tokenizer": tokenizer_of(3)})


def test_another_seed_is_refused_before_anything_is_read(made: Path) -> None:
    with pytest.raises(ValueError, match=r"step-00000002 was trained with train\.seed 0, which is 5 now"):
        resume.check_settings(made, with_("train", seed=5), {})


def test_a_damaged_configuration_is_called_damaged(made: Path) -> None:
    text = dump_config(CONFIG)
    (made / "config.yaml").write_text(text.replace("seed: 0", "seed: 7"))
    try:
        with pytest.raises(ValueError, match=r"config\.yaml is not what was saved"):
            resume.check_settings(made, CONFIG, {})
    finally:
        (made / "config.yaml").write_text(text)


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        (200, r"train\.steps was 100 and is 200: the cosine schedule .* of the next step is 8\.9\de-04, it would have"),
        (61, r"of the next step is 1\.0\de-04, it would have been 5\.\d+e-04"),
        (50, r"train\.steps was 100 and is 50: the run is at step 60, and nothing is left to train"),
    ],
)
def test_another_number_of_steps_says_what_the_schedule_does(made: Path, steps: int, said: str) -> None:
    import re

    lines = resume.check_settings(made, with_("train", steps=steps), {})
    assert lines[0].startswith("settings that have changed: train.steps 100 -> ")
    assert re.search(said, lines[1])
    assert read_index(made).serial == 1


def test_a_run_that_had_ended_is_told_the_rate_at_which_it_did() -> None:
    assert "would have been" in resume._told_steps(with_("train", steps=61), with_("train", steps=80), 60)
    assert "it ended at" in resume._told_steps(with_("train", steps=60), with_("train", steps=80), 60)
