"""Many commands, one after the other.

    python -m tests.end_to_end.commands CASES.json

CASES.json is a list of {"arguments": [...], "log": path, "accident": name}. Each runs in a forked process, exactly as
`python -m megatron_gemini.train` would, or `megatron-gemini` where the first argument is a command. Its output is in
its log; the statuses are printed as a JSON list.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_gemini import train
from megatron_gemini.checkpoint import save
from megatron_gemini.cli import COMMANDS, run_command
from megatron_gemini.cli import main as run_named


def signal_in_save() -> None:
    """SIGTERM, and Ctrl-C after it, while a checkpoint is being written."""
    seal = save.seal

    def interrupted(path: Path, *arguments: Any) -> None:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        seal(path, *arguments)

    save.seal = interrupted  # type: ignore[assignment]


def kill_in_second_save() -> None:
    """SIGKILL half-way through the second checkpoint's weights."""
    write_tensors, calls = save.write_tensors, []

    def killed(path: Path, tensors: Any) -> Any:
        entry = write_tensors(path, tensors)
        calls.append(path)
        if len(calls) == 2:
            os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        return entry

    save.write_tensors = killed  # type: ignore[assignment]


ACCIDENTS: dict[str, Callable[[], None]] = {"": lambda: None}
ACCIDENTS |= {accident.__name__: accident for accident in (signal_in_save, kill_in_second_save)}


def run_forked(case: dict[str, Any]) -> int:
    """Status of the command: its exit status, or minus the signal that ended it."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    log = os.open(case["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    ACCIDENTS[case["accident"]]()
    try:
        arguments = case["arguments"]
        status = run_named(arguments) if arguments[0] in COMMANDS else run_command(train.main, arguments)
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    sys.stdout.flush()
    os._exit(status)


def main() -> None:
    cases = json.loads(Path(sys.argv[1]).read_text())
    print(json.dumps([run_forked(case) for case in cases]))


if __name__ == "__main__":
    main()
