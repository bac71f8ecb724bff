"""What tools/install.sh decides, without installing anything; tests/run.sh itself is the test that it installs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


def bash(commands: str, **environment: str) -> subprocess.CompletedProcess[str]:
    script = f"set -euo pipefail; . {ROOT}/tools/install.sh; {commands}"
    return subprocess.run(
        ["bash", "-c", script], env={"PATH": "/usr/bin:/bin", **environment}, capture_output=True, text=True
    )


# The tests may run in the project's own environment, which may not make itself.
PYTHON = str(Path(sys.executable).resolve())


def test_the_interpreter_is_the_one_asked_for() -> None:
    assert bash("choose_python; echo $INTERPRETER", PYTHON=PYTHON).stdout == f"{PYTHON}\n"


def test_an_activated_environment_is_not_made_anew_from_itself() -> None:
    path = f"{ROOT}/.venv/bin:{Path(PYTHON).parent}:/usr/bin:/bin"
    result = bash("choose_python; echo $INTERPRETER $PATH", PATH=path, VIRTUAL_ENV=f"{ROOT}/.venv")
    assert result.returncode == 0 and f"{ROOT}/.venv" not in result.stdout
    refused = bash("choose_python", PYTHON=f"{ROOT}/.venv/bin/python")
    assert refused.returncode == 2 and "in the environment that it should make" in refused.stderr


def test_an_interpreter_that_is_none_is_told_in_one_line() -> None:
    result = bash("choose_python", PYTHON="/no/such/python")
    assert result.returncode == 2
    assert result.stderr.startswith("error: PYTHON is /no/such/python, which is no command")
    assert result.stderr.count("\n") == 1


def test_an_old_interpreter_is_refused(tmp_path: Path) -> None:
    old = tmp_path / "python"
    old.write_text('#!/bin/sh\n[ "$1" = -V ] && echo Python 3.9.1\nexit 1\n')
    old.chmod(0o755)
    result = bash("choose_python", PYTHON=str(old))
    assert result.returncode == 2
    assert "Python 3.9.1); Python 3.11 or newer is needed" in result.stderr


def test_a_failing_step_gives_its_status_its_reason_and_the_log(tmp_path: Path) -> None:
    result = bash(f"INSTALL_LOG={tmp_path}/log; logged 'one step' bash -c 'echo ERROR: no space left >&2; exit 7'")
    assert result.returncode == 7
    assert result.stderr == f"error: one step failed (ERROR: no space left); the whole log: {tmp_path}/log\n"


def test_the_environment_is_made_anew_when_a_requirement_changes(tmp_path: Path) -> None:
    for name in ("requirements.txt", "requirements-dev.txt", "constraints.txt", "pyproject.toml", "tools/install.sh"):
        target = tmp_path / name
        target.parent.mkdir(exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes())
    commands = f"ROOT={tmp_path}; HAD_TORCH=; INTERPRETER={sys.executable}; fingerprint run"
    before = bash(commands).stdout
    assert before == bash(commands).stdout != bash(f"{commands.removesuffix('run')}dev").stdout
    (tmp_path / "constraints.txt").write_text("torch==1.0\n")
    assert before != bash(commands).stdout


def test_pins_are_exact_and_fit_the_ranges() -> None:
    from packaging.requirements import Requirement

    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    wanted = [
        Requirement(line.split("#")[0])
        for file in ("requirements.txt", "requirements-dev.txt")
        for line in (ROOT / file).read_text().splitlines()
        if line.split("#")[0].strip()
    ]
    by_name = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in pins.items()}
    for requirement in wanted:
        version = by_name[re.sub(r"[-_.]+", "-", requirement.name).lower()]
        assert requirement.specifier.contains(version), f"{requirement} and {version}"
    assert "apex" not in by_name
