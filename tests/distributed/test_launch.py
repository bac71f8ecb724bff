"""What forks the ranks of the other tests ends them all when one has failed, and makes them as different as a job's."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.end_to_end.launches import ROOT, environment
from tests.processes import alive_at_last, wait_until
from tests.ranks import Ended, run_ranks

CASE = "tests.distributed.launch_case"


def said(ended: Ended) -> list[dict[str, str]]:
    """What the ranks of a `launch_case` said of themselves, by rank."""
    lines = [json.loads(line) for line in ended.output.splitlines() if line.startswith("{")]
    return sorted(lines, key=lambda line: line["RANK"])


def test_ranks_know_their_place_and_have_other_hash_seeds(tmp_path: Path) -> None:
    """In two launches from the same processes: a port of its own each, and nothing of the first in the second."""
    first, second = (said(run_ranks(CASE, 2, "pass", log=tmp_path / "log")) for _ in range(2))
    for ranks in (first, second):
        assert [(rank["RANK"], rank["LOCAL_RANK"], rank["WORLD_SIZE"]) for rank in ranks] == [
            ("0", "0", "2"),
            ("1", "1", "2"),
        ]
        assert len({rank["hash"] for rank in ranks}) == 2
        assert len({rank["MASTER_PORT"] for rank in ranks}) == 1
    assert {rank["pid"] for rank in first}.isdisjoint(rank["pid"] for rank in second)


@pytest.mark.parametrize(("how", "status"), [("raise", 1), ("exit", 3), ("kill", -9)])
def test_a_rank_that_fails_ends_the_others(how: str, status: int, tmp_path: Path) -> None:
    """Rank 0 would wait for ever."""
    ended = run_ranks(CASE, 2, how, log=tmp_path / "log")
    assert ended.status == status
    assert ("ZeroDivisionError" in ended.output) == (how == "raise")
    assert not any(psutil.pid_exists(int(rank["pid"])) for rank in said(ended))


def test_ranks_end_with_the_process_that_has_asked_for_them(tmp_path: Path) -> None:
    log = tmp_path / "log"
    code = "import sys; from pathlib import Path; from tests.ranks import run_ranks; "
    code += f"run_ranks({CASE!r}, 1, 'wait', log=Path(sys.argv[1]))"
    parent = subprocess.Popen([sys.executable, "-c", code, str(log)], cwd=ROOT, env=environment())
    assert wait_until(lambda: log.exists() and "pid" in log.read_text())
    family = psutil.Process(parent.pid).children(recursive=True)
    assert len(family) == 2
    parent.kill()
    parent.wait()
    assert not alive_at_last(family)
