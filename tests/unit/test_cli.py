"""How the commands answer: fast help, one line for a mistake, a status, and who sends in a job of several ranks."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
import time

import pytest

from megatron_gemini import __version__, cli
from megatron_gemini.exit_status import NotLearningError
from megatron_gemini.modalities.bad_sample import DataUnreachable


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})


@pytest.mark.parametrize("arguments", [["megatron_gemini.cli", "--help"], ["megatron_gemini.cli", "train", "--help"]])
def test_help_is_fast_because_nothing_heavy_is_imported(arguments):
    durations = []
    for _ in range(3):  # the least of three, and time of the CPU: other processes must not decide
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        result = run(*arguments)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        durations.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert result.returncode == 0, result.stderr
    assert min(durations) < 0.8
    code = f"import sys; from megatron_gemini.cli import main; main({arguments[1:]!r})"
    heavy = (
        "import atexit, sys; atexit.register(lambda: print(sorted({'torch', 'numpy', 'deepspeed'} & set(sys.modules))))"
    )
    result = subprocess.run([sys.executable, "-c", f"{heavy}\n{code}"], capture_output=True, text=True)
    assert result.stdout.endswith("\n[]\n")


def test_the_version_is_the_packages(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"megatron-gemini {__version__}\n"


def test_no_command_shows_the_usage_and_fails(capsys):
    assert cli.main([]) == 2
    assert "train" in capsys.readouterr().err


def test_a_mistyped_command_is_answered_with_the_nearest(capsys):
    assert cli.main(["trian"]) == 2
    assert capsys.readouterr().err == "megatron-gemini: error: 'trian' is no command; did you mean train?\n"


def test_a_users_mistake_is_one_line_and_status_2():
    result = run("megatron_gemini.train", "--train.steps", "ten")
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr == "megatron-gemini: error: --train.steps is 'ten'; it must be a whole number\n"


def test_debug_shows_the_traceback_before_the_line():
    result = run("megatron_gemini.cli", "train", "--train.steps", "ten", "--debug")
    assert result.returncode == 2
    assert result.stderr.startswith("Traceback")
    assert result.stderr.endswith("megatron-gemini: error: --train.steps is 'ten'; it must be a whole number\n")


def test_a_schedule_that_does_not_fit_is_found_before_torch_is_imported(capsys):
    assert cli.main(["train", "--train.steps", "20"]) == 2
    assert "schedule.warmup_steps is 20" in capsys.readouterr().err


def test_a_smallest_configuration_is_told_all_that_it_lacks_at_once(tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text(f"data: {{sources: [{{shards: {tmp_path}/x.tar}}]}}\ntrain: {{steps: 10}}\n")
    assert cli.main(["train", "--config", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "3 mistakes: (1) schedule.warmup_steps is 20" in error
    assert "(2) data.text_model is ''" in error and "(3) no shard matches" in error


def raising(error: BaseException):
    def main(argv: list[str]) -> int:
        raise error

    return main


def test_a_file_error_names_the_file(tmp_path, capsys):
    def main(argv: list[str]) -> int:
        return len((tmp_path / "absent.wav").read_bytes())

    assert cli.run_command(main, []) == 2
    assert capsys.readouterr().err == f"megatron-gemini: error: {tmp_path}/absent.wav: No such file or directory\n"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "No space left on device"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "run/x"), "run/x: No space left on device"),
        (OSError(errno.EROFS, os.strerror(errno.EROFS), "run"), "run: Read-only file system"),
        (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT), "run"), f"run: {os.strerror(errno.EDQUOT)}"),
        (OSError("cannot write"), "cannot write"),
    ],
)
def test_what_a_disk_refuses_is_one_line(error, line, capsys):
    assert cli.run_command(raising(error), []) == 2
    assert capsys.readouterr().err == f"megatron-gemini: error: {line}\n"


def test_a_connection_that_breaks_is_no_mistake_in_the_settings(monkeypatch, capsys):
    monkeypatch.delenv("RANK", raising=False)
    assert cli.run_command(raising(ConnectionRefusedError(111, "Connection refused")), []) == 1
    assert "Traceback" in capsys.readouterr().err


def test_an_argument_that_is_not_utf8_is_one_line():
    command = [sys.executable, "-m", "megatron_gemini.cli", "train", b"--train.output_dir", b"run-\xff"]
    done = subprocess.run(command, capture_output=True)
    assert done.returncode == 2
    words = rb"megatron-gemini: error: the argument 'run-\udcff' is not UTF-8; give texts and names of files in UTF-8"
    assert done.stderr == words + b"\n"


def test_a_run_that_does_not_learn_has_a_status_of_its_own(capsys):
    assert cli.run_command(raising(NotLearningError("steps 4 to 8 changed no weight")), []) == 3
    assert capsys.readouterr().err == "megatron-gemini: error: steps 4 to 8 changed no weight\n"


def test_storage_that_stays_away_is_one_line(capsys):
    assert cli.run_command(raising(DataUnreachable("'x.tar' cannot be read")), []) == 2
    assert capsys.readouterr().err == "megatron-gemini: error: 'x.tar' cannot be read\n"


def test_a_message_of_several_lines_becomes_one(capsys):
    assert cli.run_command(raising(ValueError("one\ntwo")), []) == 2
    assert capsys.readouterr().err == "megatron-gemini: error: one two\n"


def test_an_error_without_a_message_has_its_name(capsys):
    assert cli.run_command(raising(ValueError()), []) == 2
    assert capsys.readouterr().err == "megatron-gemini: error: ValueError\n"


def test_a_programmers_mistake_keeps_its_traceback_and_is_status_1(capsys):
    assert cli.run_command(raising(RuntimeError("broken")), []) == 1
    assert "Traceback" in capsys.readouterr().err


def test_an_interrupt_is_status_130(capsys):
    assert cli.run_command(raising(KeyboardInterrupt()), []) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_debug_is_taken_out_of_the_arguments():
    def main(argv: list[str]) -> int:
        assert argv == ["a", "b"]
        return 7

    assert cli.run_command(main, ["a", "--debug", "b"]) == 7


def test_a_rank_that_fails_alone_says_which_it_is(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setattr(cli, "PATIENCE", 0.0)
    before = signal.getsignal(signal.SIGTERM)
    assert cli.run_command(raising(ValueError("no shard")), []) == 2
    signal.signal(signal.SIGTERM, before)
    assert capsys.readouterr().err == "megatron-gemini: error: rank 3: no shard\n"


def test_a_lost_peer_is_no_traceback(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    assert cli.run_command(raising(RuntimeError("[gloo/pair.cc] Connection closed by peer [::1]")), []) == 1
    assert capsys.readouterr().err.startswith("megatron-gemini: error: lost the connection to another rank")


def test_a_mistake_that_ranks_share_is_told_once():
    """Two ranks as a launcher runs them: when rank 0 has failed, the others get SIGTERM, which they had handled."""
    code = (
        "import signal, sys; from megatron_gemini.train import main; from megatron_gemini.cli import run_command\n"
        "signal.signal(signal.SIGTERM, lambda *_: None)\n"
        "sys.exit(run_command(main, ['--train.stesp', '3']))"
    )
    ranks = [
        subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, env={**os.environ, "RANK": str(rank)})
        for rank in range(2)
    ]
    first = ranks[0].communicate()[1]
    while ranks[1].poll() is None:  # again, since its own handler swallows what comes before it has failed as well
        ranks[1].terminate()
        time.sleep(0.1)
    assert first.count(b"\n") == 1
    assert ranks[1].communicate()[1] == b""
    assert (ranks[0].returncode, ranks[1].returncode) == (2, -signal.SIGTERM)
