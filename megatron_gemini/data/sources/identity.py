"""What tells the files of a source from others, cheaply: names, sizes, and a digest of blocks spread over each."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from megatron_gemini.config.data import DataConfig
from megatron_gemini.data.sources.paths import expand_shards, open_binary
from megatron_gemini.data.sources.storage import is_url

BLOCK, BLOCKS = 4096, 16  # 64 KiB of a file: whole small ones, and a glance at a shard of a gigabyte
THREADS = 16  # files of a network file system answer late, and many at a time


def files_identity(paths: Sequence[str]) -> str:
    """Hexadecimal digest of the files in their order; folders may have other names on other machines.

    Raises ValueError for a file that is there and cannot be read.
    """
    with ThreadPoolExecutor(THREADS) as pool:
        return hashlib.sha256(json.dumps(list(pool.map(_describe, paths))).encode()).hexdigest()


def _describe(path: str) -> tuple[str, int, str]:
    name, digest = os.path.basename(path), hashlib.sha256()
    try:
        with open_binary(path) as file:
            size = file.seek(0, os.SEEK_END)
            last = max(size - BLOCK, 0)
            for number in range(BLOCKS):
                # Of a file that is not larger than all blocks they overlap, and nothing is left out.
                file.seek(last * number // (BLOCKS - 1))
                digest.update(file.read(BLOCK))
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):  # a plugin's samples may lie in no file
        return name, -1, ""
    except OSError as error:
        raise ValueError(f"cannot read {path!r}: {error.strerror or error}") from error
    return name, size, digest.hexdigest()


def shared_with_validation(data: DataConfig) -> str:
    """A line on files that are both trained on and held out; empty if there are none."""
    trained = {(_place(path), source.filters) for source in data.sources for path in _files(source.shards)}
    # With other filters they may be other samples of the same files.
    shared = [p for each in data.validation for p in _files(each.shards) if (_place(p), each.filters) in trained]
    if not shared:
        return ""
    return (
        f"warning: {len(set(shared))} files of data.validation are also in data.sources ({shared[0]}): the validation "
        "loss does not tell what has been learned by heart; hold other files out"
    )


def _files(shards: str) -> list[str]:
    try:
        return expand_shards(shards)
    except ValueError:  # told by who reads them
        return []


def _place(path: str) -> str:
    return path if is_url(path) else os.path.realpath(path)
