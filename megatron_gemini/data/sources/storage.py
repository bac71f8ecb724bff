"""Storage that answers late or not at all, told apart from data that are bad.

A network file system or an object store fails for seconds now and then. Taken for damage, such a moment would leave
samples out, and the run could not be repeated.
"""

from __future__ import annotations

import errno
import logging
import math
import time
from collections.abc import Callable
from typing import TypeVar

from megatron_gemini.modalities.bad_sample import BadSample, DataUnreachable, one_line

logger = logging.getLogger(__name__)
Read = TypeVar("Read")
DELAYS = (0.5, 2.0, 8.0, 30.0)  # seconds before each further try
MISTAKES = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
"""What another try would not change when files are first opened."""
STRANGE_NAMES = (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL)
"""What a file's name alone can cause; it must end no run, so it is not taken for storage that is away."""
# What fsspec opens without running a program or calling a host that the name alone chooses. Chained addresses (::)
# are refused with the others: "simplecache::" writes files, and any scheme can stand behind it.
STORES = ("memory", "s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oss", "hdfs")
sleep: Callable[[float], None] = time.sleep
"""Tests put another in its place."""


def is_url(path: str) -> bool:
    """Whether a path names an object store. Raises ValueError for a scheme that is not one of `STORES`."""
    scheme, separator, _ = path.partition("://")
    if not separator and not path.startswith("pipe:"):
        return False
    if scheme not in STORES or "::" in path:
        raise ValueError(f"{path!r} is no path that data is read from; use a local one or {', '.join(STORES)}://...")
    return True


def _nobody(reads: bool) -> None:
    pass


reading: Callable[[bool], None] = _nobody
"""Told when storage is about to be read (True), and when that is over: a worker's clock stands still meanwhile."""


def patiently(
    read: Callable[[], Read],
    path: str,
    mistakes: tuple[type[OSError], ...] = (),
    trouble: type[Exception] | None = None,
) -> Read:
    """What `read` gives of the file at `path`, asked again after each of `DELAYS` where it cannot be reached.

    mistakes: errors that are raised at once. trouble: those that count as such; any for a store, OSError for a local
    file. Raises DataUnreachable after the last try, BadSample as `read` does.
    """
    # The clients of object stores have errors of their own, which are no OSError.
    trouble = trouble or (Exception if is_url(path) else OSError)
    reading(True)
    try:
        for delay in (*DELAYS, math.inf):
            try:
                return read()
            except trouble as error:
                if isinstance(error, (BadSample, DataUnreachable, *mistakes)):
                    raise
                if delay == math.inf:
                    raise DataUnreachable(
                        f"{path!r} cannot be read ({one_line(error)}), also not {sum(DELAYS):g} seconds later; no "
                        "sample was left out for it, so go on with the run once the storage is back"
                    ) from error
                logger.warning("%r cannot be read (%s); trying again in %g s", path, one_line(error), delay)
            sleep(delay)
        raise AssertionError("the last try returns or raises")
    finally:
        reading(False)
