"""Writing shards: the same samples give the same bytes, a shard is whole or absent, a finished build is reused."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from megatron_gemini.data.sources.tar_index import index_tar

if TYPE_CHECKING:
    from megatron_gemini.data.samples.decode_json import Json

Sample: TypeAlias = tuple[str, Mapping[str, bytes]]
"""(key, members by ending)."""


def write_shards(folder: Path, name: str, samples: Iterable[Sample], samples_per_shard: int = 1000) -> dict[Path, int]:
    """Write `folder/name-000.tar`, `name-001.tar`, ... and remove those of an earlier, longer build.

    Members carry no times or owners. A shard appears under its name only when it is complete.
    Returns the number of samples of each shard. Raises ValueError when there are no samples.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shards: dict[Path, int] = {}
    rest = iter(samples)
    while chunk := list(itertools.islice(rest, samples_per_shard)):
        path = folder / f"{name}-{len(shards):03d}.tar"
        write_shard(path, chunk)
        shards[path] = len(chunk)
    if not shards:
        raise ValueError(f"there are no samples for {str(folder / name)!r}")
    # A glob would find the last shards of a longer build and train on them.
    for stale in set(folder.glob(f"{name}-[0-9][0-9][0-9].tar")) - set(shards):
        stale.unlink()
    return shards


def write_shard(path: Path, samples: Iterable[Sample]) -> None:
    """Write one shard. Members carry no times or owners, and it appears under its name only when it is complete."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with tarfile.open(partial, "w", format=tarfile.USTAR_FORMAT) as tar:
            for key, members in samples:
                for ending, data in members.items():
                    header = tarfile.TarInfo(f"{key}.{ending}")  # whose time, owner and rights are always the same
                    header.size = len(data)
                    tar.addfile(header, io.BytesIO(data))
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def shard_digest(path: Path) -> str:
    """SHA-256 over names and contents of a shard's members, without image codes: those are added later, in place."""
    digest = hashlib.sha256()
    index = index_tar(str(path))
    with open(path, "rb") as file:
        for member in index.members:
            if not member.name.endswith(".codes.json"):  # or a build would count as changed, and throw the codes away
                file.seek(member.offset)
                digest.update(f"{member.name}\0{member.size}\0".encode())
                digest.update(file.read(member.size))
    digest.update(index.damage.encode())
    return digest.hexdigest()


def write_manifest(path: Path, options: Mapping[str, Json], shards: Mapping[Path, int]) -> None:
    """Record a finished build: its options, and each shard's number of samples and digest, relative to the manifest."""
    entries: dict[str, Json] = {
        str(shard.relative_to(path.parent)): {"samples": samples, "sha256": shard_digest(shard)}
        for shard, samples in sorted(shards.items())
    }
    write_json(path, {"options": dict(options), "shards": entries})


def is_built(path: Path, options: Mapping[str, Json]) -> bool:
    """Whether the manifest at `path` is of these options and all its shards are there, unchanged."""
    try:
        manifest = json.loads(path.read_text())
        same = manifest["options"] == json.loads(json.dumps(options))  # tuples become the lists that were written
        return same and all(
            shard_digest(path.parent / name) == entry["sha256"] for name, entry in manifest["shards"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def write_json(path: Path, value: Json) -> None:
    """Write JSON so that the file is whole or absent."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")
    os.replace(partial, path)


def json_member(value: Json) -> bytes:
    """A value as a shard's .json member."""
    return json.dumps(value, sort_keys=True).encode()
