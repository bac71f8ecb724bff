"""The console script, and how every entry point ends: with a status, and a mistake of the user's in one line.

Exit status: 0 done; 2 a mistake in settings, files or data (`ValueError`, or a file that cannot be read or written), or
storage that does not answer, told in one line, with its traceback only after `--debug`; 3 a training run whose steps
change no weight; 4 a rank that gave no sign of life; 1 anything else, with its traceback; 130 interrupted.

In a job of several ranks all of them usually meet the same mistake. Rank 0 tells it at once; another rank first waits
`PATIENCE` seconds, in which the launcher ends it if rank 0 failed too. So a shared mistake is told once, and one of a
single rank is told with the number of that rank.
"""

from __future__ import annotations

import difflib
import importlib
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import NoReturn

from megatron_gemini import __version__, plugins
from megatron_gemini.exit_status import FAILED, INTERRUPTED, MISTAKE, NOT_LEARNING, NotLearningError
from megatron_gemini.modalities.bad_sample import DataUnreachable

COMMANDS = {
    "plan": "find a layout of ranks for machines that are not there yet",
    "train": "train a model, or go on with a run that was stopped",
    "generate": "ask a trained model, in text, images, audio and video",
    "evaluate": "score a trained model on validation data",
    "checkpoint": "list, verify, compare and prune checkpoints, or take their weights out",
}
_MODULES = {"checkpoint": "checkpoint_command"}  # the others are called as their commands are
PATIENCE = 5.0  # DeepSpeed's launcher looks at its ranks once a second, torchrun more often
_PEER_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")


def main(argv: list[str] | None = None) -> int:
    """`megatron-gemini COMMAND ...`. Returns the exit status."""
    arguments = sys.argv[1:] if argv is None else argv
    return run_command(_dispatch, arguments)


def script() -> NoReturn:
    """The console script."""
    end(main())


def end(status: int) -> NoReturn:
    """End the process with an exit status, without the interpreter's teardown if it joined a process group."""
    # Not imported: a command that never joined a group has nothing to end, and torch would take seconds.
    distributed = sys.modules.get("megatron_gemini.engine.distributed")
    if distributed is not None:
        distributed.end_process(status)
    sys.exit(status)


def _dispatch(argv: list[str]) -> int:
    command, rest = (argv[0], argv[1:]) if argv else ("", [])
    # By name: each command imports what it needs, and `--help` of this script none of it.
    if command in COMMANDS:
        return importlib.import_module(f"megatron_gemini.{_MODULES.get(command, command)}").main(rest)
    if command == "--version":
        print(f"megatron-gemini {__version__}")
    elif command in ("--help", "-h", "help"):
        print(_usage())
    elif not command:
        print(_usage(), file=sys.stderr)
        return 2
    else:
        close = difflib.get_close_matches(command, COMMANDS, n=1)
        way_out = f"did you mean {close[0]}?" if close else f"there are {', '.join(COMMANDS)}"
        raise ValueError(f"{command!r} is no command; {way_out}")
    return 0


def _usage() -> str:
    commands = "\n".join(f"  {name:<10} {what}" for name, what in COMMANDS.items())
    return (
        "usage: megatron-gemini [--help] [--version] COMMAND ...\n\n"
        f"Natively multimodal models: training, generation, evaluation.\n\ncommands:\n{commands}\n\n"
        "megatron-gemini COMMAND --help shows a command's options.\n"
        "--debug after any command shows the traceback of a mistake.\n"
        "--plugin MODULE after any command imports a module that adds encoders, connectors, objectives and the like."
    )


def run_command(main: Callable[[list[str]], int], argv: list[str]) -> int:
    """Run an entry point's `main(argv)` and turn what it raises into an exit status (see the top of this file).

    `--debug` and `--plugin MODULE` are taken out of argv before `main` sees it, and the plugins are loaded.
    """
    debug = "--debug" in argv
    try:
        _check_text(argv)
        return main(plugins.start([argument for argument in argv if argument != "--debug"]))
    except KeyboardInterrupt:
        print("megatron-gemini: interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        status = _status(error)
        # The rank that failed first tells why. What the others tell is only that they noticed.
        if status == FAILED and any(sign in str(error) for sign in _PEER_LOST) and _rank() is not None:
            _report("lost the connection to another rank; what that rank printed says why", debug)
        elif status == FAILED:
            traceback.print_exc()
        else:
            _report(_one_line(error), debug)
        return status


def _status(error: Exception) -> int:
    if isinstance(error, NotLearningError):
        return NOT_LEARNING
    # A full disk and a folder that is read-only are the user's to mend as much as a mistyped name. A connection is not.
    mistake = isinstance(error, (ValueError, OSError, DataUnreachable)) and not isinstance(error, ConnectionError)
    return MISTAKE if mistake else FAILED


def _check_text(argv: list[str]) -> None:
    """Raise `ValueError` for an argument that is not UTF-8: no YAML, JSON or tokenizer could take it."""
    for argument in argv:
        if not argument.isascii() and any("\ud800" <= character <= "\udfff" for character in argument):
            raise ValueError(f"the argument {argument!a} is not UTF-8; give texts and names of files in UTF-8")


def _report(line: str, debug: bool) -> None:
    rank = _rank() or 0
    if rank and not debug:
        # The launcher gets the time to end this rank, also where SIGTERM has a handler that would let it live on. Only
        # the main thread may set one.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(PATIENCE)
    where = f"rank {rank}: " if rank else ""
    if debug:
        traceback.print_exc()
    print(f"megatron-gemini: error: {where}{line}", file=sys.stderr, flush=True)


def _rank() -> int | None:
    rank = os.environ.get("RANK", "")
    return int(rank) if rank.isdecimal() else None


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, OSError) and error.strerror:  # what is written to an open file does not know its name
        return error.strerror
    return " ".join(str(error).split("\n")) or type(error).__name__


if __name__ == "__main__":
    script()
