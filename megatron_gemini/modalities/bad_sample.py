"""The one error of unusable input, which data counts by reason and command lines print."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

FILTERED = "filtered:"


class BadSample(ValueError):
    """An image, clip, recording or text that cannot be used.

    reason: short slug that is the same for every sample of this kind ("image_too_large"), to count by.
    str(): one line that names the offending value and the limit.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(reason, message)  # both in args, so that the error survives pickling between processes
        self.reason = reason
        self.message = message

    def __str__(self) -> str:
        return self.message


class FilteredSample(BadSample):
    """A sample that a filter of its source leaves out: counted, but nothing is wrong with it.

    Its reason begins with `FILTERED`.
    """


class DataUnreachable(Exception):
    """Storage that does not answer, however often it is asked: no sample's fault, so the run ends and can go on later.

    Not an OSError, since a library on the way may take one for the end of a file or for damage.
    """


@contextlib.contextmanager
def guarded(step: str, key: str) -> Iterator[None]:
    """A wall around one step of one sample: whatever it raises is a BadSample, `<step>_failed`, that names the sample.

    BadSample and DataUnreachable pass as they are. The error itself is the cause, for a traceback.
    """
    try:
        yield
    except (BadSample, DataUnreachable):
        raise
    # Samples come from strangers, and pass through libraries and plugins whose errors nobody can list.
    except Exception as error:
        words = f"{key}: {step} raised {type(error).__name__}: {one_line(error)}"
        raise BadSample(f"{step}_failed", words) from error


_OBJECT = re.compile(r" ?<[\w.]+ object at 0x[0-9a-f]+>|: '<none>'|\[Errno \d+\] ")
"""What libraries say of the object in memory that they were given in the place of a file, and FFmpeg's own numbers."""


def one_line(error: BaseException) -> str:
    """A decoder's own words, short enough for a log line and without the addresses of objects."""
    words = " ".join(_OBJECT.sub("", str(error)).split())
    return words[:160] or type(error).__name__
