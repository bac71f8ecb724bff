"""Build shards of captioned pictures from folders or tables, files or addresses.

    python tools/build_shards.py --images photos/ --out shards/                  cat.jpg with cat.txt beside it
    python tools/build_shards.py --images classes/ --captions folder --out shards/     the folder's name is the caption
    python tools/build_shards.py --table photos.csv --out shards/                columns `image` (a path) and `caption`
    python tools/build_shards.py --table laion.parquet --url-column URL --min similarity=0.3 --only NSFW=UNLIKELY \\
        --workers 32 --out shards/                                               downloads, see docs/building.md

    python tools/build_shards.py --images photos/ --validation 0.05 --out shards/     one in 20 in shards/validation/

Writes shard-00000.tar, ... (KEY.jpg, png or webp as it was; KEY.txt; KEY.json with the table's columns, size and
SHA-256), report.json, sizes.png and samples.png. A build that was stopped, in whatever way, goes on when the same
command is given again, and ends with the same shards.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_gemini.building.captions import CaptionOrigin
from megatron_gemini.modalities.bad_sample import DataUnreachable

if TYPE_CHECKING:
    from megatron_gemini.building.filters import Filters
    from megatron_gemini.building.records import Record
    from megatron_gemini.data.samples.decode_json import Json


def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    try:
        _build(options)
    except (ValueError, OSError, DataUnreachable) as error:
        print(f"build_shards: {' '.join(str(error).split()) if isinstance(error, OSError) else error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("build_shards: interrupted; the same command goes on", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    inputs = parser.add_mutually_exclusive_group(required=True)
    inputs.add_argument("--images", nargs="+", metavar="FOLDER", help="folders of pictures, with all folders in them")
    inputs.add_argument("--table", metavar="FILE", help="a .csv, .tsv, .jsonl or .parquet table, one picture a row")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder of the shards and the report")
    parser.add_argument(
        "--captions",
        choices=[kind.value for kind in CaptionOrigin],
        default="txt",
        help="of --images: the text file beside a picture, its folder's name or its own (default: %(default)s)",
    )
    for name, what in (("image", "paths"), ("url", "addresses"), ("caption", "captions")):
        parser.add_argument(f"--{name}-column", default="", metavar="NAME", help=f"the table's column of {what}")
    parser.add_argument("--root", default="", metavar="DIR", help="folder of the table's paths (default: the table's)")
    parser.add_argument("--name", default="shard", help="of the shards (default: %(default)s)")
    parser.add_argument(
        "--validation",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="of the samples that is held out, by their content, in the folder DIR/validation (default: none)",
    )
    parser.add_argument("--samples-per-shard", type=int, default=1000, metavar="N", help="(default: %(default)s)")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="processes (default: one a core)"
    )
    _add_filters(parser)
    parser.add_argument("--max-bytes", type=int, default=20_000_000, metavar="N", help="of a file (default: 20000000)")
    parser.add_argument("--seconds", type=float, default=20.0, metavar="S", help="of a download (default: %(default)s)")
    return parser


def _add_filters(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what is left out")
    group.add_argument(
        "--dedup", choices=("none", "exact", "perceptual"), default="exact", help="(default: %(default)s)"
    )
    group.add_argument(
        "--dedup-bits", type=int, default=5, metavar="N", help="by which two pictures may differ, of 128 (default: 5)"
    )
    group.add_argument("--min-side", type=int, default=1, metavar="PIXELS", help="of the shorter side")
    group.add_argument("--max-aspect", type=float, default=200.0, metavar="RATIO", help="longer over shorter side")
    group.add_argument("--min-caption", type=int, default=1, metavar="N", help="characters")
    group.add_argument("--max-caption", type=int, default=100_000, metavar="N", help="characters")
    group.add_argument(
        "--script",
        action="append",
        default=[],
        metavar="NAME",
        help="a writing system that captions may use, by its Unicode name: LATIN, CYRILLIC, HAN; may be repeated",
    )
    group.add_argument("--min", action="append", default=[], metavar="COLUMN=NUMBER", help="may be repeated")
    group.add_argument("--max", action="append", default=[], metavar="COLUMN=NUMBER", help="may be repeated")
    group.add_argument("--only", action="append", default=[], metavar="COLUMN=VALUE,...", help="may be repeated")


def _build(options: argparse.Namespace) -> None:
    from megatron_gemini.building.build import BuildPlan, build  # here, so that --help answers at once
    from megatron_gemini.building.examine import Examiner
    from megatron_gemini.building.fetch import Fetcher
    from megatron_gemini.building.finish import finish
    from megatron_gemini.building.folders import folder_records
    from megatron_gemini.building.records import Columns, fingerprint, row_count, table_records

    for option, most in (("workers", 1024), ("max_bytes", 2**40), ("seconds", 86_400)):
        value = getattr(options, option)
        if not 0 < value <= most:
            raise ValueError(f"--{option.replace('_', '-')} is {value}; it must be above 0 and at most {most}")
    filters = _filters(options)
    fetcher = Fetcher(max_bytes=options.max_bytes, seconds=options.seconds)
    plan = BuildPlan(
        Examiner(filters, fetcher, options.max_bytes),
        options.dedup,
        options.dedup_bits,
        options.samples_per_shard,
        options.name,
        options.validation,
    )
    records: Iterable[Record]
    total: int | None
    passed_over: Mapping[str, int] = {}
    files: list[str | Path]
    if options.images:
        found, passed_over = folder_records(options.images, CaptionOrigin(options.captions), options.out)
        captions = (record.caption for record in found if isinstance(record.caption, Path))
        records, total, files = found, len(found), [*(record.image for record in found), *captions]
    else:
        columns = Columns(options.image_column, options.url_column, options.caption_column, options.root)
        records = table_records(options.table, columns)
        total, files = row_count(options.table), [options.table]
    kept = {name: value for name, value in vars(options).items() if name not in ("out", "workers", "images", "table")}
    identity: dict[str, Json] = {"input": fingerprint(files), "options": kept}
    entries = build(records, plan, options.out, identity, options.workers, total)
    print(finish(entries, options.out, kept, passed_over))


def _filters(options: argparse.Namespace) -> Filters:
    from megatron_gemini.building.filters import Filters

    return Filters(
        options.min_side,
        options.max_aspect,
        options.min_caption,
        options.max_caption,
        tuple(name.upper() for name in options.script),
        tuple((name, _number("--min", text)) for name, text in _pairs("--min", options.min)),
        tuple((name, _number("--max", text)) for name, text in _pairs("--max", options.max)),
        tuple((name, tuple(text.split(","))) for name, text in _pairs("--only", options.only)),
    )


def _pairs(option: str, given: Sequence[str]) -> list[tuple[str, str]]:
    pairs = [text.partition("=") for text in given]
    for name, equals, value in pairs:
        if not (name and equals and value):
            raise ValueError(f"{option} {name}{equals}{value}: write COLUMN=VALUE")
    return [(name, value) for name, _, value in pairs]


def _number(option: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if math.isnan(value):  # which is neither below nor above a limit
        raise ValueError(f"{option} takes a number after the column, not {text!r}")
    return value


if __name__ == "__main__":
    sys.exit(main())
