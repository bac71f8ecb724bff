"""Compiling of DeepSpeed's operators: where, with a line while it takes long, and not longer than the run."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from types import FrameType

import psutil

LONG = 3.0
"""Seconds from which a build is told of: only to load what is there takes less."""
_ENDING = (signal.SIGTERM, signal.SIGHUP)  # Ctrl-C reaches the compilers from the terminal


def build_folder() -> Path:
    """Where this environment's operators are built: the user's TORCH_EXTENSIONS_DIR, or a folder of its own.

    torch has one folder for all environments of a Python version, and compares the paths of the sources. So two
    checkouts with an environment each built each other's operators again at every start. An environment that is
    reached by a link counts as another, since the paths differ.
    """
    given = os.environ.get("TORCH_EXTENSIONS_DIR")
    if given:
        return Path(given)
    import torch
    from torch.utils.cpp_extension import get_default_build_root

    python = f"py{sys.version_info.major}{sys.version_info.minor}"
    environment = (sys.prefix, sys.version, torch.__version__, version("deepspeed"))
    key = hashlib.sha256("\0".join(environment).encode()).hexdigest()[:12]
    return Path(get_default_build_root()) / f"megatron-gemini-{python}-{key}"


def use_own_build_folder() -> None:
    """Tell torch of `build_folder`, in this process and those that it starts; before anything is built."""
    os.environ["TORCH_EXTENSIONS_DIR"] = str(build_folder())


@contextlib.contextmanager
def builds_watched(rank: int) -> Iterator[None]:
    """Inside, rank 0 says what is being compiled, and a signal that ends this process ends its compilers before."""
    ended = threading.Event()
    teller = threading.Thread(target=_tell, args=(ended,), daemon=True)
    previous = {}
    if threading.current_thread() is threading.main_thread():
        previous = {number: signal.getsignal(number) for number in _ENDING}
        for number in _ENDING:
            if previous[number] is signal.SIG_DFL:  # not where somebody else has a plan
                signal.signal(number, _end_with_children)
    if rank == 0:
        teller.start()
    try:
        yield
    finally:
        ended.set()
        for number, handler in previous.items():
            if signal.getsignal(number) is _end_with_children:
                signal.signal(number, handler)


def _end_with_children(number: int, frame: FrameType | None) -> None:
    # Compilers go on when the process that started them is gone. They are ninja's children, and it ended first.
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            child.terminate()
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def _tell(ended: threading.Event, clock: Callable[[], float] = time.monotonic) -> None:
    """Say once of every operator that a lock has stood beside it for `LONG` seconds."""
    folder, first, told = build_folder(), dict[Path, float](), set[Path]()
    while not ended.wait(LONG / 10):
        locks = set(folder.glob("*/lock"))
        first = {lock: first.get(lock, clock()) for lock in locks}
        for lock in sorted(locks - told):
            if clock() - first[lock] >= LONG:
                told.add(lock)
                where = f"in {lock.parent}; a minute or two, once for this environment"
                print(f"compiling DeepSpeed's operator {lock.parent.name} {where}", file=sys.stderr, flush=True)
