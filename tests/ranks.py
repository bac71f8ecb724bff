"""Ranks of a test on this machine, forked from processes that have imported everything once a session."""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import selectors
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from tests.end_to_end.launches import ROOT, environment, free_port


@dataclass(frozen=True)
class Ended:
    """How ranks ended: the first status that is not 0, and all that they said."""

    status: int
    output: str


@functools.cache
def template(rank: int) -> tuple[IO[bytes], IO[bytes]]:
    """(requests, answers) of a `rank_template`, which is started once and ends with this process.

    One for each rank, so that ranks have other hash seeds, as those of a job have: what they send in the order of a set
    must hang here too.
    """
    command = [sys.executable, "-m", "tests.rank_template", str(rank)]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
    )
    atexit.register(process.communicate)  # closes its input, and waits for its end
    assert process.stdin is not None and process.stdout is not None
    return process.stdin, process.stdout


def run_ranks(module: str, ranks: int, *arguments: object, log: Path) -> Ended:
    """`python -m module` on gloo ranks of one job. If one fails, the others are killed. log: for what they say."""
    job = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    places = [{**job, "RANK": rank, "LOCAL_RANK": rank} for rank in range(ranks)]
    return _run(module, [{name: str(value) for name, value in place.items()} for place in places], arguments, log)


def run_alone(module: str, *arguments: object, log: Path) -> Ended:
    """`python -m module` in a process without a launcher."""
    return _run(module, [{}], arguments, log)


def _run(module: str, places: Sequence[dict[str, str]], arguments: Sequence[object], log: Path) -> Ended:
    """One process for each of `places`, variables of the environment."""
    log.write_text("")
    templates = [template(rank) for rank in range(len(places))]
    for (requests, _), place in zip(templates, places, strict=True):
        given = {"module": module, "arguments": [*map(str, arguments)], "environment": environment() | place}
        requests.write(json.dumps({**given, "log": str(log)}).encode() + b"\n")
    running = {answers: int(answers.readline()) for _, answers in templates}
    status = 0
    try:
        for code in _statuses(running):
            if code and not status:
                status = code
                _kill(running)
    finally:
        _kill(running)  # of a test that took too long
        for _ in _statuses(running):
            pass
    return Ended(status, log.read_text(errors="replace"))


def _statuses(running: dict[IO[bytes], int]) -> Iterator[int]:
    """As they end, and leave `running`."""
    with selectors.DefaultSelector() as selector:
        for answers in running:
            selector.register(answers, selectors.EVENT_READ)
        while running:
            for key, _ in selector.select():
                answers: IO[bytes] = key.fileobj  # type: ignore[assignment]
                selector.unregister(answers)
                del running[answers]
                yield int(answers.readline())


def _kill(running: dict[IO[bytes], int]) -> None:
    for process in running.values():
        with contextlib.suppress(ProcessLookupError):  # it has ended by itself
            os.kill(process, signal.SIGKILL)
