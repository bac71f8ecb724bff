"""A run's folder through kills, restarts and damage: what is complete is found, and nothing else is taken for it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch

from megatron_gemini.checkpoint import directory
from megatron_gemini.checkpoint.index import RunId, read_index, seal
from megatron_gemini.checkpoint.publish import publish, recover, remove
from megatron_gemini.checkpoint.tensor_file import Outgoing, write_tensors
from tests.unit.checkpoint.killing import kill_at


def save(run: Path, step: int, run_id: RunId, keep: int = 2, content: str = "weights") -> Path:
    temporary, final = directory.temporary_directory(run, step), directory.step_directory(run, step)
    recover(run)
    temporary.mkdir(parents=True)
    for name in ("rank-00000.json", "image_tokenizer/model"):
        (temporary / name).parent.mkdir(exist_ok=True)
        (temporary / name).write_text(content)
    seal(temporary, run_id, directory.next_serial(run))
    publish(temporary, final, keep, run_id)
    return final


def content(run: Path) -> str:
    """Of the checkpoint that a reader gets, which must be whole."""
    found = directory.resolve(run)
    directory.verify(found)
    return (found / "rank-00000.json").read_text()


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


@pytest.mark.parametrize("case", ["next", "replaced", "anew", "put back"])
def test_no_kill_leaves_a_moment_without_a_complete_copy(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader gets the copy before or the new one, and so does the next start."""
    run_id = RunId()
    template = tmp_path / "template"
    for step in (1, 2) if case == "next" else (1,):
        save(template, step, run_id, content="old")
    if case == "put back":  # both copies aside, as a kill between two renames leaves them
        folder = template / "checkpoints"
        shutil.copytree(folder / "step-00000001", folder / ".step-00000001.old.tmp")
        os.replace(folder / "step-00000001", folder / ".step-00000001.tmp")
    number, killed = 0, True
    seen = set()
    while killed:
        number += 1
        run = shutil.copytree(template, tmp_path / f"{number}")
        later = RunId() if case == "anew" else run_id
        step = {"next": 3, "replaced": 1, "anew": 1, "put back": 1}[case]
        if case == "put back":
            killed = kill_at(number, monkeypatch, lambda run=run: recover(run))
        else:
            killed = kill_at(number, monkeypatch, lambda *_: save(run, step, later, content="new"))  # noqa: B023
        before = content(run)
        seen.add(before)
        recover(run)
        assert content(run) == before
        assert not [name for name in names(run) if name.startswith(".step")]
        save(run, 9, later, content="last")
        assert content(run) == "last"
        assert not [name for name in names(run) if name.startswith(".step")]
        shutil.rmtree(run)
    assert number > 3
    assert seen == ({"old"} if case == "put back" else {"old", "new"})


def test_the_step_that_was_published_last_is_used_whatever_its_number(tmp_path: Path) -> None:
    first, anew = RunId(), RunId()
    save(tmp_path, 7, first)
    save(tmp_path, 9, first)
    last = save(tmp_path, 3, anew)
    (tmp_path / "checkpoints" / "latest").unlink()
    assert directory.newest(tmp_path).path == last
    (tmp_path / "checkpoints" / "latest").write_text("step-00000009\n")  # killed after the rename, before the pointer
    assert directory.newest(tmp_path).path == last


def test_a_run_deletes_its_own_steps_alone(tmp_path: Path) -> None:
    """Also those of the starts that it went on from, and never those of another run, whatever their numbers."""
    other, first = RunId(), RunId()
    save(tmp_path, 2, other)
    save(tmp_path, 30, other)
    save(tmp_path, 1, first)
    resumed = RunId(parent=first.id)
    save(tmp_path, 4, resumed)
    again = RunId(parent=resumed.id)
    save(tmp_path, 5, again)
    save(tmp_path, 6, again)
    assert names(tmp_path) == ["latest", "step-00000002", "step-00000005", "step-00000006", "step-00000030"]


@pytest.mark.parametrize("gone", ["index.json", "."])
def test_a_latest_that_is_not_complete_is_told(tmp_path: Path, gone: str) -> None:
    run_id = RunId()
    older, last = save(tmp_path, 1, run_id), save(tmp_path, 2, run_id)
    remove(last if gone == "." else last / gone)
    found = directory.newest(tmp_path)
    assert found.path == older
    assert len(found.warnings) == 1 and "latest names step-00000002, which " in found.warnings[0]


def test_a_latest_with_a_damaged_index_is_refused_with_the_way_out(tmp_path: Path) -> None:
    run_id = RunId()
    save(tmp_path, 1, run_id)
    last = save(tmp_path, 2, run_id)
    (last / "index.json").write_text("{")
    with pytest.raises(ValueError, match=r"step-00000001 beside it is complete: delete .*step-00000002 to take that$"):
        directory.newest(tmp_path)


def test_a_step_that_is_a_link_is_unlinked_and_what_it_leads_to_stays(tmp_path: Path) -> None:
    run, run_id = tmp_path / "run", RunId()
    for step in (1, 2):
        made = save(run, step, run_id)
        os.replace(made, tmp_path / made.name)
        made.symlink_to(tmp_path / made.name)
    save(run, 2, run_id)  # in the place of a link
    save(run, 3, run_id)  # rotates another away
    (run / "checkpoints" / ".step-00000009.tmp").symlink_to(tmp_path / "step-00000001")
    save(run, 4, run_id)
    assert names(run) == ["latest", "step-00000003", "step-00000004"]
    assert all((tmp_path / f"step-0000000{step}" / "rank-00000.json").is_file() for step in (1, 2))


def test_a_reader_takes_the_newest_where_a_run_has_deleted_what_it_read(tmp_path: Path) -> None:
    run_id = RunId()
    save(tmp_path, 1, run_id)
    steps = iter((2, 3))

    def read(found: Path) -> str:
        step = next(steps, None)
        if step is not None:  # the run goes on meanwhile, and keeps one
            save(tmp_path, step, run_id, keep=1)
        directory.verify(found)
        return found.name

    assert directory.read_newest(tmp_path, directory.resolve, read) == "step-00000003"


def test_a_save_while_a_reader_looks_is_no_reason_for_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id, true = RunId(), directory.complete_steps
    save(tmp_path, 1, run_id)
    steps = iter((2, 3))

    def looking(run: Path) -> object:
        found, step = true(run), next(steps, None)
        if step is not None:
            with monkeypatch.context() as patch:
                patch.setattr(directory, "complete_steps", true)
                save(tmp_path, step, run_id, keep=1)
        return found

    monkeypatch.setattr(directory, "complete_steps", looking)
    found = directory.newest(tmp_path)
    assert found.path == directory.step_directory(tmp_path, 3) and not found.warnings


@pytest.mark.parametrize("replaced", [False, True])
def test_a_step_that_goes_while_it_is_read_is_not_called_damaged(tmp_path: Path, replaced: bool) -> None:
    run_id = RunId()
    step = save(tmp_path, 1, run_id)

    def read(found: Path) -> None:
        if replaced:
            save(tmp_path, 1, run_id, content="other")
        else:
            save(tmp_path, 2, run_id, keep=1)

    with pytest.raises(ValueError, match="was deleted or replaced while it was read"):
        directory.read_newest(step, directory.resolve, read)


def test_what_is_damaged_is_called_so_also_by_a_reader_that_would_begin_again(tmp_path: Path) -> None:
    step = save(tmp_path, 1, RunId())
    (step / "rank-00000.json").write_text("weightz")
    with pytest.raises(ValueError, match="its hash differs"):
        directory.read_newest(tmp_path, directory.resolve, directory.verify)


def test_an_index_knows_the_run_and_counts(tmp_path: Path) -> None:
    run_id = RunId(parent="f" * 32)
    indices = [read_index(save(tmp_path, step, run_id)) for step in (5, 2)]
    assert [index.serial for index in indices] == [1, 2]
    assert all(index.run == run_id for index in indices)
    assert RunId().id != RunId().id


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"../../other/checkpoints/step-00000006"])
def test_a_latest_that_names_no_checkpoint_is_told(tmp_path: Path, content: bytes) -> None:
    save(tmp_path, 2, RunId())
    (tmp_path / "checkpoints" / "latest").write_bytes(content)
    found = directory.newest(tmp_path)
    assert found.path is not None and found.path.name == "step-00000002"
    assert len(found.warnings) == 1 and found.warnings[0].endswith("latest is damaged: it names no checkpoint")


def test_a_folder_in_the_place_of_latest_is_refused_at_the_start(tmp_path: Path) -> None:
    save(tmp_path, 2, RunId())
    (tmp_path / "checkpoints" / "latest").unlink()
    (tmp_path / "checkpoints" / "latest").mkdir()
    with pytest.raises(ValueError, match=r"latest is a folder, .*; remove it"):
        directory.newest(tmp_path)


def test_weights_may_be_read_by_whom_the_umask_lets(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        write_tensors(tmp_path / "a.safetensors", [Outgoing("a", (2,), torch.float32, lambda: torch.zeros(2))])
    finally:
        os.umask(before)
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o644
