"""A process that has imported what a rank needs, and forks one whenever it is asked: imports are 6 s of CPU time.

    python -m tests.rank_template RANK

It reads a request a line: {"module", "arguments", "environment", "log"}. The fork runs the module as `python -m` does,
in that environment, with its output at the end of the log. Its process id is answered at once, in a line, and its
status in another when it has ended.
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import select
import signal
import sys
import warnings
from importlib import import_module
from typing import Any, NoReturn

from megatron_gemini.training.quiet import quiet_warnings

FOREIGN = ("deepspeed", "megatron.core.parallel_state")
OURS = ("megatron_gemini.objectives.packed", "megatron_gemini.training.loop", "tests.distributed.train_layouts")
OF_RANK_0 = ("matplotlib.figure",)  # which draws the curves


def import_what_a_rank_needs(rank: int) -> None:
    with warnings.catch_warnings():  # a fork chooses by itself what it does not want to hear
        quiet_warnings()
        for name in FOREIGN:
            import_module(name)
    for name in (*OURS, *(OF_RANK_0 if rank == 0 else ())):
        import_module(name)


def become(request: dict[str, Any]) -> NoReturn:
    """Run what was asked for, in a fork."""
    status = 1
    try:
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        for stream, number in ((os.open(os.devnull, os.O_RDONLY), 0), (log, 1), (log, 2)):
            os.dup2(stream, number)
        os.environ.clear()
        os.environ.update(request["environment"])
        sys.argv[1:] = request["arguments"]
        runpy.run_module(request["module"], run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def status_of(child: int) -> int:
    """Once it has ended; it is killed if nobody is left who asks."""
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if select.select([0], [], [], 0.02)[0]:  # nobody asks meanwhile, so this is the end of the input
            os.kill(child, signal.SIGKILL)
            os._exit(1)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what an import prints is no answer
    import_what_a_rank_needs(int(sys.argv[1]))
    gc.collect()
    gc.freeze()  # the forks' collections leave its memory alone
    if os.path.exists("/proc/self/task"):
        assert len(os.listdir("/proc/self/task")) == 1, "a fork would lack the other threads"
    for line in iter(sys.stdin.readline, ""):
        child = os.fork()
        if not child:
            become(json.loads(line))
        print(child, file=answers)
        print(status_of(child), file=answers)
    os._exit(0)  # what is frozen would be called a leak


if __name__ == "__main__":
    main()
