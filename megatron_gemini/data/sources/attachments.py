"""Files that a record names: images and sounds of a document or conversation, in the folder of its shard."""

from __future__ import annotations

import os
import stat
from functools import partial

from megatron_gemini.data.sources.index_cache import sample_key
from megatron_gemini.data.sources.paths import open_binary
from megatron_gemini.data.sources.spec import Records
from megatron_gemini.data.sources.storage import STRANGE_NAMES, is_url, patiently
from megatron_gemini.data.sources.tar_index import MAX_MEMBER_BYTES
from megatron_gemini.modalities.bad_sample import BadSample


def read_named(records: Records, sample: int, name: str) -> bytes | None:
    """A file that a document names: a member of its sample, otherwise a file in the folder of its shard.

    None if there is none. Raises BadSample as `read_attachment` and `Records.read` do.
    """
    for member in dict.fromkeys(
        (name, name.lower())
    ):  # endings of members are lower case, names in documents may not be
        if found := records.read(sample, [member]).get(member):
            return found
    # A record that was written for a folder of files, beside its file as a member: 0/a.jpg of the sample a is its jpg.
    stem, ending = sample_key(name.rpartition("/")[2])
    if stem == records.key(sample).rpartition("/")[2] and ending in records.endings(sample):
        return records.read(sample, [ending]).get(ending)
    return read_attachment(records.path(sample), name)


def read_attachment(shard: str, name: str) -> bytes | None:
    """The file `name` in the folder that holds `shard`, or below it; None if there is none.

    A name is data of strangers: nothing outside the folder is read, whether it is reached by `..`, an absolute path or
    a link. Raises BadSample: unsafe_name, attachment_too_large, attachment_refused; DataUnreachable.
    """
    parts = name.split("/")
    # A backslash, a colon and NUL mean something to other systems, to stores and to the C library; half a character is
    # no name at all.
    special = set(name) & set("\\\0:") or any("\ud800" <= letter <= "\udfff" for letter in name)
    if not name or len(name) > 1024 or special or any(part in ("", ".", "..") for part in parts):
        raise BadSample("unsafe_name", f"{name[:80]!r} is no path below the folder of the shard")
    folder = shard.rpartition("/")[0] if is_url(shard) else os.path.dirname(shard) or "."
    return patiently(partial(_read, folder, name), f"{folder}/{name}")


def _read(folder: str, name: str) -> bytes | None:
    path = f"{folder}/{name}"
    try:
        if not is_url(path):
            if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would be waited for
                return None
            # The name is plain, but what lies there may be a link that somebody put into the folder.
            if os.path.commonpath([os.path.realpath(path, strict=True), os.path.realpath(folder)]) != os.path.realpath(
                folder
            ):
                raise BadSample("unsafe_name", f"{name[:80]!r} is a link out of the folder of the shard")
        with open_binary(path) as file:
            data = file.read(MAX_MEMBER_BYTES + 1)  # one byte more tells a file that is too large from one that is not
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return None
    except OSError as error:
        if error.errno not in STRANGE_NAMES:
            raise
        raise BadSample("attachment_refused", f"{path}: {error.strerror or type(error).__name__}") from None
    if len(data) > MAX_MEMBER_BYTES:
        raise BadSample("attachment_too_large", f"{name[:80]!r} has more than {MAX_MEMBER_BYTES:,} bytes")
    return data
