"""Read a source once with the loader and print what it skipped, in a process whose memory can be measured.

python -m tests.unit.data.malice_run TASK SHARD
"""

from __future__ import annotations

import json
import resource
import sys

from megatron_gemini.config.data import SourceConfig
from megatron_gemini.data.loader import Loader
from tests.tiny_shards import LAYOUT, Characters, run_config


def main(arguments: list[str]) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result = [read(task, shard) for task, shard in zip(arguments[::2], arguments[1::2], strict=True)]
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"sources": result, "grown_mb": (after - before) / 1024}))


def read(task: str, shard: str) -> dict[str, object]:
    """keys: of all samples drawn, good and bad, in order; skipped: the loader's own count."""
    source = SourceConfig(shards=shard, task=task, name="s")
    config = run_config([source], rows_per_step=1, lanes=1, look_ahead=1, row_tokens=128, max_bad_share=1.0)
    with Loader(config, 0, 1, LAYOUT, Characters()) as loader:
        (made,) = loader.sources
        while (drawn := loader.state()["0"]["drawn"]["s"]) < len(made):
            loader.next()
        keys = [made.shards.keys[made.sample_at(position)[1]] for position in range(drawn)]
        return {"keys": keys, "skipped": {reason: count for (_, reason), count in loader.skipped.items()}}


if __name__ == "__main__":
    main(sys.argv[1:])
