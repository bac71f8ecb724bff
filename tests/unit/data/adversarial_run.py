"""Read sources once with the loader and print what it skipped, in a process whose memory can be measured."""

from __future__ import annotations

import json
import re
from pathlib import Path

from megatron_gemini.config.data import SourceConfig
from megatron_gemini.data.loading.loader import Loader
from tests.tiny_shards import FORM, LAYOUT, Characters, run_config


def main(arguments: list[str]) -> None:
    """arguments: TASK SHARD, any number of times."""
    before = peak_mb()
    result = [read(task, shard) for task, shard in zip(arguments[::2], arguments[1::2], strict=True)]
    print(json.dumps({"sources": result, "grown_mb": peak_mb() - before}))


def peak_mb() -> float:
    """Most memory that this process ever had. (Not ru_maxrss, which counts the parent that forked it.)"""
    return int(re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[0]) / 1024


def read(task: str, shard: str) -> dict[str, object]:
    """keys: of all samples drawn, good and bad, in order; skipped: the loader's own count."""
    source = SourceConfig(shards=shard, task=task, name="s")
    config = run_config([source], rows_per_step=1, lanes=1, look_ahead=1, row_tokens=128, max_bad_share=1.0)
    with Loader(config, 0, 1, LAYOUT, Characters(), FORM) as loader:
        (made,) = loader.sources
        while (drawn := loader.state()["0"]["drawn"]["s"]) < len(made):
            loader.next()
        keys = [made.shards.key(made.order.at(position)[1]) for position in range(drawn)]
        return {"keys": keys, "skipped": {reason: count for (_, reason), count in loader.skipped.items()}}
