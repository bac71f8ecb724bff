"""Look at what shards hold: counts, sizes, what is damaged, and a page of samples.

    python tools/inspect_shards.py shards/shard-*.tar --sheet samples.png
    python tools/inspect_shards.py 'shards/shard-{00000..00999}.tar' --at-most 10       a few samples of each

Every member is read and decoded as training would. The exit status is 1 when something is damaged.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_gemini.modalities.bad_sample import DataUnreachable


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", nargs="+", metavar="SHARD", help="tars; globs and {000..015} are expanded")
    parser.add_argument("--at-most", type=int, default=0, metavar="N", help="samples of a shard to read (default: all)")
    parser.add_argument("--sheet", type=Path, metavar="PNG", help="write a contact sheet of the samples")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    options = parser.parse_args(argv)
    try:
        return _inspect(options)
    except (ValueError, OSError, DataUnreachable) as error:
        print(f"inspect_shards: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _inspect(options: argparse.Namespace) -> int:
    from megatron_gemini.building.contact_sheet import contact_sheet  # here, so that --help answers at once
    from megatron_gemini.building.inspect import inspect, lines, plain
    from megatron_gemini.data.sources.paths import expand_shards
    from megatron_gemini.data.sources.recognize import JSON_LINES, PARQUET, recognize
    from megatron_gemini.data.sources.shards import Shards

    if options.at_most < 0:
        raise ValueError(f"--at-most is {options.at_most}; it is a number of samples, 0 for all")
    paths = [path for pattern in options.shards for path in expand_shards(pattern)]
    for path in paths:
        if what := recognize(path):
            reads = "; a run reads it as it is, and this tool reads tars" if what in (JSON_LINES, PARQUET) else ""
            raise ValueError(f"{path!r} is {what}{reads}")
    found = inspect(paths, options.at_most)
    print(json.dumps(plain(found), indent=1) if options.json else "\n".join(lines(found)))
    usable = [path for path in paths if path not in found.damage]
    if options.sheet and usable:
        contact_sheet(Shards(usable)).save(options.sheet)
    return 1 if found.bad or found.damage else 0


if __name__ == "__main__":
    sys.exit(main())
