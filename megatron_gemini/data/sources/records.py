"""The samples of a source, whatever its files are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_gemini.config.data import AUTO, SourceConfig
from megatron_gemini.data.sources.paths import expand_shards
from megatron_gemini.registry import FORMATS

if TYPE_CHECKING:
    from megatron_gemini.data.sources.spec import Records


def open_records(source: SourceConfig, names: Sequence[str], cache: Path | None = None) -> Records:
    """The records of a source. names: what will be read of them. cache: folder for indices that take long to make.

    Raises ValueError for files that are missing, cannot be read or are of several formats.
    """
    paths = expand_shards(source.shards)
    if source.format != AUTO:
        return FORMATS.get(source.format).open(paths, names, cache)
    # Of two formats with one ending the older has it, so that no plugin changes how built-in ones are found.
    by_ending = {ending: spec.name for spec in reversed(FORMATS.entries()) for ending in spec.endings}
    kinds = {by_ending.get(Path(path).suffix.lower(), FORMATS.names[0]) for path in paths}
    if len(kinds) > 1:
        raise ValueError(
            f"{paths[0]!r} and others are {' and '.join(sorted(kinds))} files; make two data sources of them"
        )
    return FORMATS.get(kinds.pop()).open(paths, names, cache)
