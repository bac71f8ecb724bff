"""How records name media: the name of a member or file, a data URL, or a mapping that holds one of these."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TypeAlias
from urllib.parse import unquote_to_bytes

from megatron_gemini.data.samples.decode_json import decode_json
from megatron_gemini.data.sources.columns import Structure, Words
from megatron_gemini.data.sources.tar_index import MAX_MEMBER_BYTES
from megatron_gemini.modalities.bad_sample import BadSample

if TYPE_CHECKING:
    from megatron_gemini.config.schema import Plain

Fetch: TypeAlias = Callable[[str], bytes | None]
"""Gives a file that a document or conversation names; None if there is none."""
DATA_URL = "data:"
# Keys of a mapping that hold the content itself, in base64, and such that name it. Tables of the Hugging Face hub have
# bytes and path, OpenAI's parts url, or data and format, and chat templates of transformers url, path or base64.
_CONTENT = ("bytes", "data", "base64")
_NAMES = ("url", "path")
_REMOTE = ("http://", "https://")


def reference(value: Plain) -> str:
    """A name or data URL from what a record says. Raises BadSample: bad_json."""
    if isinstance(value, str) and value:
        return value
    if isinstance(value, Mapping):
        for key in _CONTENT:
            content = value.get(key)
            if isinstance(content, str) and content:
                # What stands for bytes of a table's column keeps its name; anything else is the content itself.
                named = content.startswith((DATA_URL, "column:"))
                return content if named else f"{DATA_URL};base64,{content}"
        for key in _NAMES:
            name = value.get(key)
            if isinstance(name, str) and name:
                return name
    raise BadSample("bad_json", f"media are named by a path or a data URL, or by one in a mapping; not {shown(value)}")


def named_item(content: bytes) -> str:
    """The reference that a column holds in place of an item: text, or a mapping or a list of one; empty if it holds the
    item itself. Raises BadSample: several_items, for a list of more than one name; bad_json."""
    if isinstance(content, Words):
        return content.decode("utf-8", "surrogatepass")
    value = decode_json(content) if isinstance(content, Structure) else None
    if isinstance(value, list) and value and all(isinstance(each, (str, dict)) for each in value):
        if len(value) > 1:
            raise BadSample("several_items", f"the column names {len(value)} items, and the task has one")
        return reference(value[0])
    named = isinstance(value, dict) and value.keys() & {*_CONTENT, *_NAMES}
    return reference(value) if named else ""


def read_reference(name: str, fetch: Fetch) -> bytes | None:
    """What a reference stands for; None if there is no such file. Raises BadSample: bad_data_url, remote_media,
    media_too_large, or what `fetch` raises."""
    if name.startswith(_REMOTE):  # a shard is no reason to call a host that it names
        raise BadSample("remote_media", f"{name[:80]!r} is an address, and none is fetched in training; store the file")
    if not name.startswith(DATA_URL):
        return fetch(name)
    head, comma, content = name.partition(",")
    if len(content) > 4 * MAX_MEMBER_BYTES // 3:  # base64 has 4 characters for 3 bytes
        raise BadSample("media_too_large", f"a data URL of {len(content):,} characters; the limit is 256 MiB")
    try:
        if not comma:
            raise ValueError("no comma")
        if not head.endswith(";base64"):
            return unquote_to_bytes(content)
        return base64.b64decode("".join(content.split()), validate=True)
    except (ValueError, binascii.Error):
        raise BadSample("bad_data_url", f"{name[:40]!r} is no data URL") from None


def shown(value: Plain) -> str:
    """Strangers' data, short enough for an error."""
    return str(value)[:80]
