"""From a record to a sample that is fit for a shard, or to the reason why there is none. Runs in worker processes."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import stat
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from megatron_gemini.building.duplicates import difference_hash
from megatron_gemini.building.fetch import Fetcher
from megatron_gemini.building.filters import Filters
from megatron_gemini.building.records import Record
from megatron_gemini.data.sources.storage import STRANGE_NAMES, patiently
from megatron_gemini.modalities.bad_sample import BadSample, DataUnreachable, one_line
from megatron_gemini.modalities.image.preprocess import decode_image
from megatron_gemini.modalities.text.preprocess import decode_text

if TYPE_CHECKING:
    from megatron_gemini.config.schema import Plain

_ENDINGS = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpg", b"RIFF": "webp"}


@dataclass(frozen=True)
class Examined:
    """A record that was read. reason: why it is left out, '' if it is not, and then the rest is set.

    data: the file's bytes, named by its content; picture: `difference_hash`.
    """

    record: Record
    reason: str = ""
    detail: str = ""
    data: bytes = b""
    ending: str = ""
    caption: str = ""
    sha256: str = ""
    picture: int = 0
    width: int = 0
    height: int = 0

    def metadata(self) -> dict[str, Plain]:
        """The sample's .json member: its table's columns, under what the build knows itself."""
        name = self.record.image if self.record.is_url else os.path.basename(self.record.image)
        own: dict[str, Plain] = {"source": name, "sha256": self.sha256, "width": self.width, "height": self.height}
        return {**self.record.columns, **own}


@dataclass(frozen=True)
class Examiner:
    """Reads a record, cheapest checks first, so that nothing is fetched that a column or a caption rules out."""

    filters: Filters
    fetcher: Fetcher
    max_bytes: int
    """Of an image file."""

    def __call__(self, record: Record) -> Examined:
        try:
            return self._examine(record)
        except BadSample as error:
            return Examined(record, error.reason, f"{record.image[:200]}: {error}")
        except DataUnreachable:
            raise
        except Exception as error:  # whatever a record holds, the build goes on with the next one
            return Examined(record, "record_failed", f"{record.image[:200]}: {type(error).__name__}: {one_line(error)}")

    def _examine(self, record: Record) -> Examined:
        _refuse(record.problem or self.filters.check_columns(record.columns), "the table's row says so")
        caption = _caption(record)
        _refuse(self.filters.check_caption(caption), f"{len(caption)} characters: {caption[:60]!r}")
        # The most expensive step comes last: what a column or the caption rules out is never downloaded.
        data = self.fetcher.fetch(record.image) if record.is_url else read_file(record.image, self.max_bytes)
        for algorithm, expected in record.hashes.items():
            _refuse(
                hashlib.new(algorithm, data).hexdigest() != expected and "wrong_hash", f"not the table's {algorithm}"
            )
        image_HW3 = decode_image(data)
        height, width = image_HW3.shape[:2]
        _refuse(self.filters.check_size(width, height), f"{width} x {height} pixels")
        # By the content: names and the server's type are somebody else's claims.
        ending = next((ending for start, ending in _ENDINGS.items() if data.startswith(start)), "")
        if not ending:  # one that few programs read: GIF, BMP, TIFF, AVIF
            file = io.BytesIO()
            Image.fromarray(image_HW3).save(file, "PNG")
            data, ending = file.getvalue(), "png"
        sha256 = hashlib.sha256(data).hexdigest()
        return Examined(record, "", "", data, ending, caption, sha256, difference_hash(image_HW3), width, height)


def read_file(path: str, max_bytes: int) -> bytes:
    """A regular file of at most `max_bytes`, asked again while the storage does not answer.

    Raises BadSample: no_file, no_regular_file, file_too_large, read_error. Raises DataUnreachable after the last try.
    """
    return patiently(partial(_read_file, path, max_bytes), path)


def _read_file(path: str, max_bytes: int) -> bytes:
    try:
        # A pipe or a device among the pictures must not make the build wait.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise BadSample("no_regular_file", "it is no regular file")
            if status.st_size > max_bytes:
                raise BadSample("file_too_large", f"it has {status.st_size:,} bytes; the limit is {max_bytes:,}")
            return file.read(max_bytes)
    except FileNotFoundError:
        raise BadSample("no_file", "there is no such file") from None
    except (IsADirectoryError, NotADirectoryError):
        raise BadSample("no_regular_file", "it is no regular file") from None
    except OSError as error:
        if error.errno not in (*STRANGE_NAMES, errno.ENXIO):  # the last: a socket
            raise
        raise BadSample("read_error", str(error.strerror)) from None


def _caption(record: Record) -> str:
    if isinstance(record.caption, Path):
        try:
            return decode_text(read_file(str(record.caption), 1024 * 1024))
        except BadSample as error:
            if error.reason == "no_file":
                raise BadSample("no_caption", f"there is no {record.caption.name} beside it") from None
            raise BadSample(error.reason.replace("file_", "caption_file_"), str(error)) from None
    if record.caption is None:
        raise BadSample("no_caption", "the table has none")
    return decode_text(record.caption.encode("utf-8", "surrogatepass"))


def _refuse(reason: str | bool, detail: str) -> None:
    if reason:
        raise BadSample(str(reason), detail)
