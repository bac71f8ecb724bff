"""Where operators are compiled, and what is told and ended while they are."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest

from megatron_gemini.engine import builds
from megatron_gemini.engine.builds import build_folder, builds_watched, use_own_build_folder
from tests.processes import HANGS_AFTER, alive_at_last


def test_each_environment_has_a_folder_and_each_version_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    ours = build_folder()
    assert ours == build_folder()
    changes: list[tuple[object, str, object]] = [
        (sys, "prefix", "/another/checkout/.venv"),
        (sys, "version", "3.99"),
        (builds, "version", lambda _: "0.0.1"),
    ]
    for owner, name, value in changes:
        with monkeypatch.context() as changed:
            changed.setattr(owner, name, value)
            assert build_folder() != ours and build_folder().parent == ours.parent


def test_a_link_to_an_environment_has_a_folder_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """torch compares the paths of the sources, which begin with the link: both would build in the other's folder."""
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    (tmp_path / "link").symlink_to(sys.prefix)
    ours = build_folder()
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "link"))
    assert build_folder() != ours


def test_the_users_own_folder_stays(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    use_own_build_folder()
    assert os.environ["TORCH_EXTENSIONS_DIR"] == str(tmp_path)


def test_torch_builds_in_the_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils.cpp_extension import _get_build_directory

    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "")
    monkeypatch.setattr(os, "makedirs", lambda *_, **__: None)
    use_own_build_folder()
    assert Path(_get_build_directory("an_operator", verbose=False)) == build_folder() / "an_operator"


def test_a_long_build_is_told_once_and_a_short_one_never(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    now = [0.0]
    looks = iter([["adam", "short"]] * 3 + [["adam"]] * 4)

    class Looks(threading.Event):
        """A look a second, and what is being built at each."""

        def wait(self, timeout: float | None = None) -> bool:
            now[0] += 1
            there = next(looks, None)
            for name in ("adam", "short"):
                (tmp_path / name).mkdir(exist_ok=True)
                (tmp_path / name / "lock").unlink(missing_ok=True)
            for name in there or []:
                (tmp_path / name / "lock").touch()
            return there is None

    builds._tell(Looks(), lambda: now[0])
    said = f"compiling DeepSpeed's operator adam in {tmp_path}/adam; a minute or two, once for this environment\n"
    assert capsys.readouterr().err == said


BUILDING = """
import subprocess
from megatron_gemini.engine.builds import builds_watched
with builds_watched(1):
    subprocess.run(["sh", "-c", "sleep 1000 & echo $! && wait"])
"""


def test_a_signal_that_ends_the_process_ends_its_compilers() -> None:
    process = subprocess.Popen([sys.executable, "-c", BUILDING], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    compiler = psutil.Process(int(process.stdout.readline()))
    try:
        process.send_signal(signal.SIGTERM)
        assert process.wait(HANGS_AFTER) == -signal.SIGTERM
        assert not alive_at_last([compiler]), "the compiler goes on"
    finally:
        process.kill()
        process.stdout.close()


def test_handlers_are_as_they_were_behind_it() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)]
    with builds_watched(1):
        pass
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)] == before
