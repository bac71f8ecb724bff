"""A save that cannot be written: one line, and what was saved before stays."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from megatron_gemini.checkpoint import directory, load
from megatron_gemini.checkpoint import save as saving
from megatron_gemini.checkpoint.run_state import RunState
from megatron_gemini.checkpoint.save import ROLES, SaveError, save
from megatron_gemini.contracts import TokenLayout
from tests.tiny_checkpoint import CONFIG
from tests.unit.checkpoint.still_engine import StillEngine


@pytest.fixture(scope="module")
def engine() -> StillEngine:
    return StillEngine(CONFIG, TokenLayout(300, (("image", 12),)))


def full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "some file")


def test_roles_that_are_not_readable_are_one_line(engine: StillEngine, tmp_path: Path) -> None:
    for content in ("[1]", "{", "3"):
        (tmp_path / ROLES).write_text(content)
        with pytest.raises(ValueError, match=r"roles\.json is not readable: .*; the checkpoint is damaged$"):
            load._check_origins(engine, tmp_path)


@pytest.mark.parametrize(
    ("module", "name", "stub"),
    [
        (saving, "write_tensors", full),
        (saving, "write_text", full),
        (saving, "seal", full),
        (saving.shutil, "copyfile", full),
        (os, "replace", full),
        (os, "mkdir", full),
    ],
)
def test_a_full_disk_is_one_line_and_the_checkpoint_before_stays(
    module: object, name: str, stub: object, engine: StillEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (asset := tmp_path / "text.model").write_bytes(b"model")
    before = save(engine, tmp_path, progress := RunState(step=1), {"text.model": asset}, keep=1)
    with monkeypatch.context() as patch:
        patch.setattr(module, name, stub)
        progress.step = 2
        with pytest.raises(SaveError, match=r"cannot write .*step-00000002: .*No space left on device.*; ") as error:
            save(engine, tmp_path, progress, {"text.model": asset}, keep=1)
    assert "\n" not in str(error.value)
    assert directory.newest(tmp_path).path == before
    directory.verify(before)
    after = save(engine, tmp_path, progress, {"text.model": asset}, keep=1)
    assert directory.newest(tmp_path).path == after
    assert sorted(path.name for path in after.parent.iterdir()) == ["latest", "step-00000002"]
