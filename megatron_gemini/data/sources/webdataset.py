"""WebDataset: tars on this machine or in an object store, of which members that share a key are one sample."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_gemini.data.sources.shards import Shards
from megatron_gemini.data.sources.spec import FormatSpec
from megatron_gemini.data.sources.storage import is_url
from megatron_gemini.data.sources.tars import RemoteTars


def open_tars(paths: Sequence[str], names: Sequence[str], cache: Path | None) -> Shards:
    return RemoteTars(paths) if any(map(is_url, paths)) else Shards(paths, cache)


WEBDATASET = FormatSpec("webdataset", endings=(".tar",), open=open_tars)
