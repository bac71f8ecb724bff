"""Entry point of what is done with checkpoints on a disk: `megatron-gemini checkpoint list | verify | diff | ...`."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from megatron_gemini.checkpoint.blocks import hash_file
from megatron_gemini.checkpoint.directory import (
    STEP,
    complete_steps,
    newest,
    read_newest,
    resolve,
    verify,
)
from megatron_gemini.checkpoint.index import Index, read_index, verify_files
from megatron_gemini.checkpoint.publish import lineage, rotated, unpublish
from megatron_gemini.cli import end, run_command
from megatron_gemini.generation.options import OptionParser

PROG = "megatron-gemini checkpoint"
_WHICH = "a run's folder (its newest one), or one of its checkpoints/step-*"
DTYPES = ("float32", "bfloat16", "float16")
_DESCRIPTION = """What is there, whether it is whole, what differs, the weights in one file, and what may go.

  megatron-gemini checkpoint list runs/quickstart
  megatron-gemini checkpoint verify runs/quickstart                      # or one of its checkpoints/step-*
  megatron-gemini checkpoint diff runs/a/checkpoints/step-00000100 runs/b
  megatron-gemini checkpoint weights runs/quickstart --out model --dtype bfloat16
  megatron-gemini checkpoint prune runs/quickstart --keep 2 --every 1000 # shows what would go; --yes deletes it
"""


def main(argv: list[str]) -> int:
    """Do what is named. Returns the exit status."""
    actions: dict[str, Callable[[list[str]], int]] = {
        "list": _list,
        "verify": _verify,
        "diff": _diff,
        "weights": _weights,
        "prune": _prune,
    }
    if not argv or argv[0] in ("--help", "-h"):
        parser = OptionParser(PROG, _DESCRIPTION)
        parser.add_argument("action", choices=tuple(actions))
        print(parser.format_help(), file=sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    if argv[0] not in actions:
        raise ValueError(f"{argv[0]!r} is nothing that {PROG} does; there are {', '.join(actions)}")
    return actions[argv[0]](argv[1:])


def _parser(action: str, what: str) -> OptionParser:
    return OptionParser(f"{PROG} {action}", what)


def size_of(index: Index) -> int:
    """Bytes of a checkpoint's files."""
    return sum(entry.size for entry in index.files.values())


def _told(size: int) -> str:
    return f"{size / 1e9:.3g} GB" if size >= 10**9 else f"{size / 1e6:.3g} MB"


def _list(argv: list[str]) -> int:
    parser = _parser("list", "The checkpoints of a run in the order in which they were saved.")
    parser.add_argument("run", type=Path, help="a run's folder")
    run: Path = parser.parse(argv).run
    if not (run / "checkpoints").is_dir():
        raise ValueError(f"{run} has no folder checkpoints; give a run's train.output_dir")
    found, steps = newest(run), complete_steps(run)
    for warning in found.warnings:
        print(f"warning: {warning}")
    for index, path in steps:
        origin = f"  after {index.run.parent[:8]}" if index.run.parent else ""
        mark = "  <- a run goes on from here" if path == found.path else ""
        print(f"{path.name}  {_told(size_of(index)):>9}  run {index.run.id[:8]}{origin}{mark}")
    if not steps:
        print("no complete checkpoint")
    return 0


def _verify(argv: list[str]) -> int:
    parser = _parser("verify", "Compare every byte of a checkpoint with its index; tells all files that differ.")
    parser.add_argument("checkpoint", type=Path, help=_WHICH)
    directory = resolve(parser.parse(argv).checkpoint)
    index = read_index(directory)
    verify_files(directory, index, ())  # names and sizes first: they take no time

    def differs(name: str) -> bool:
        return hash_file(directory / name) != index.files[name]

    names = sorted(index.files, key=lambda name: -index.files[name].size)
    bar = tqdm(total=size_of(index), unit="B", unit_scale=True, disable=None, leave=False)
    with ThreadPoolExecutor() as pool, bar:
        damaged = []
        for name, bad in zip(names, pool.map(differs, names), strict=True):
            bar.update(index.files[name].size)
            damaged += [name] if bad else []
    if damaged:
        raise ValueError(f"{directory}: not what was saved (the hash differs): {', '.join(sorted(damaged))}")
    print(f"{directory} is whole: {len(names)} files, {_told(size_of(index))}")
    return 0


def _diff(argv: list[str]) -> int:
    parser = _parser("diff", "What differs between two checkpoints; status 1 if anything does.")
    parser.add_argument("before", type=Path, help=_WHICH)
    parser.add_argument("after", type=Path, help="the same")
    options = parser.parse(argv)
    from megatron_gemini.checkpoint.compare import compare  # torch takes seconds

    before, after = resolve(options.before), resolve(options.after)
    for each in (before, after):
        verify(each, but_pieces=True)
    lines = compare(before, after)
    print("\n".join(lines) if lines else f"{before} and {after} have the same settings, state and weights")
    return int(bool(lines))


def _weights(argv: list[str]) -> int:
    parser = _parser("weights", "Whole weights in one safetensors file, with all that generate and evaluate need.")
    parser.add_argument("checkpoint", type=Path, help=_WHICH)
    parser.add_argument("--out", type=Path, required=True, help="folder that is made")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights (default: %(default)s)")
    options = parser.parse(argv)
    if options.out.exists():
        raise ValueError(f"--out {options.out} is there already; name another folder")
    from megatron_gemini.checkpoint.whole import write_whole  # torch takes seconds

    beside = options.out.with_name(f".{options.out.name}.tmp")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        count = read_newest(
            options.checkpoint, resolve, lambda directory: write_whole(directory, beside, options.dtype)
        )
        beside.rename(options.out)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    print(f"wrote {count:,} parameters as {options.dtype} to {options.out}")
    return 0


def _prune(argv: list[str]) -> int:
    parser = _parser("prune", "Delete older checkpoints of a run, as training with these settings would.")
    parser.add_argument("run", type=Path, help="a run's folder")
    parser.add_argument("--keep", type=int, default=2, help="newest ones that stay (default: %(default)s)")
    parser.add_argument("--every", type=int, default=0, help="steps whose multiples stay as well (default: none)")
    parser.add_argument("--yes", action="store_true", help="delete; otherwise what would go is only shown")
    options = parser.parse(argv)
    if options.keep < 1 or options.every < 0:
        raise ValueError(f"--keep is {options.keep} and --every {options.every}; keep 1 or more, every 0 or more")
    steps = [(index, path) for index, path in complete_steps(options.run) if STEP.fullmatch(path.name)]
    if not steps:
        raise ValueError(f"{options.run} holds no complete checkpoint; give a run's train.output_dir")
    mine = lineage(steps[-1][0].run, [index for index, _ in steps])
    going = rotated([path for index, path in steps if index.run.id in mine], options.keep, options.every)
    freed = sum(size_of(index) for index, path in steps if path in going)
    if options.yes and going:
        from megatron_gemini.training.run_lock import RunLock

        lock = RunLock(options.run)
        lock.take()  # a run that trains here deletes by itself, and may read what would go
        try:
            for path in going:
                unpublish(path)
        finally:
            lock.release()
    done = "deleted" if options.yes else "would delete (--yes does)"
    print("\n".join([f"{done} {path}" for path in going]) if going else "nothing to delete")
    print(f"{len(steps) - len(going)} stay, {_told(freed)} {'freed' if options.yes else 'to be freed'}")
    return 0


if __name__ == "__main__":
    end(run_command(main, sys.argv[1:]))
