"""What asks a process to stop: signals, and launchers that end without a word."""

import os
import signal
import subprocess
import sys

import pytest

from megatron_gemini.training.stop import LAUNCHER_GONE, StoppedError, StopRequest, is_launcher, reason, started


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_is_remembered_and_the_first_one_counts(number: signal.Signals) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup's would be left as it is
    stop = StopRequest()
    stop.install()
    try:
        assert stop.requested() == 0
        signal.raise_signal(number)
        signal.raise_signal(signal.SIGTERM)
        assert stop.requested() == number
    finally:
        stop.restore()
        signal.signal(signal.SIGHUP, before)


def test_restore_gives_back_what_was_there() -> None:
    before = signal.getsignal(signal.SIGTERM)
    stop = StopRequest()
    stop.install()
    stop.restore()
    assert signal.getsignal(signal.SIGTERM) == before


def test_nothing_disturbs_the_way_out() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    stop = StopRequest()
    stop.install()
    stop.ignore()
    try:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        assert stop.number == 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in (signal.SIGUSR1, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)


def test_nohup_is_respected() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = StopRequest()
    try:
        stop.install()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        stop.restore()
        signal.signal(signal.SIGHUP, before)


def test_a_launcher_that_ends_asks_to_stop() -> None:
    stop = StopRequest()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as launcher:
        stop._launchers = [(launcher.pid, started(launcher.pid))]
        assert stop.requested() == 0
        launcher.kill()
    assert stop.requested() == LAUNCHER_GONE
    assert reason(LAUNCHER_GONE) == "the end of its launcher"
    assert StoppedError(LAUNCHER_GONE).code == 143


def test_a_launcher_that_nobody_waits_for_has_ended_all_the_same() -> None:
    """As in a container, whose first process may wait for no one."""
    stop = StopRequest()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as launcher:
        stop._launchers = [(launcher.pid, started(launcher.pid))]
        launcher.kill()
        os.waitid(os.P_PID, launcher.pid, os.WEXITED | os.WNOWAIT)  # ended, and still in the table of processes
        assert started(launcher.pid) == ""
        assert stop.requested() == LAUNCHER_GONE


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (["/env/bin/python", "/env/bin/deepspeed", "--module", "megatron_gemini.train"], True),
        (["/env/bin/python", "-u", "-m", "deepspeed.launcher.launch", "--world_info=x"], True),
        (["/env/bin/python3.11", "/env/bin/torchrun", "--nproc-per-node", "2"], True),
        (["python", "-m", "torch.distributed.run"], True),
        (["bash", "/home/me/deepspeed/run.sh"], False),
        (["bash", "deepspeed_job.sh"], False),
        (["python", "-m", "pytest", "tests/deepspeed"], False),
        (["bash", "-c", "deepspeed --module megatron_gemini.train"], False),
        ([""], False),
    ],
)
def test_only_the_launchers_themselves_are_watched(command: list[str], expected: bool) -> None:
    assert is_launcher([*command, ""]) is expected
