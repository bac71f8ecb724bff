"""Changes the code in one place at a time, and looks which tests notice. Takes hours; not a part of the checks.

    python -m tools.mutate --sample 300 --seed 11 --out mutants.jsonl     # goes on where it was ended
    python -m tools.mutate --out mutants.jsonl --table                    # Markdown of what it has found

A sample of all changes of `tools/mutations.py` in the chosen folders, made in a temporary copy of the checkout. For
each one, the test files that import the changed file, over the fewest steps first, run until one fails. A change that
lets tests run into their time limit counts as noticed. Copied are tests, tools, examples, docs and the package.

The heavy libraries are imported once, and every change runs in a fork of that process.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tools.mutations import Mutation, mutations_of
from tools.nearest_tests import PACKAGE, ROOT, Imports

FOLDERS = ("models", "kernels", "engine", "parallel", "data", "training")
PASSED, NO_TESTS = 0, 5  # of pytest's exit statuses
SURVIVED = "survived"


@dataclass(frozen=True)
class Result:
    """Of one mutation. by: the test that failed, "time limit of FILE", or `SURVIVED`. tests: files that ran."""

    file: str
    line: int
    kind: str
    change: str
    by: str
    tests: int
    seconds: float


def run_test(path: Path, root: Path, limit: float) -> str:
    """What failed of the tests of a file, empty if they pass; in a fork of this process, of at most `limit` seconds."""
    log, end = root / "pytest.log", time.monotonic() + limit
    child = os.fork()
    if not child:
        os.setsid()  # so that what a test starts ends with it
        _be_pytest(path, root, log)
    while not (status := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() > end:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return f"time limit of {path.relative_to(root)}"
        time.sleep(0.05)
    code = os.waitstatus_to_exitcode(status[1])
    if code in (PASSED, NO_TESTS):
        return ""
    lines = log.read_text(errors="replace").splitlines()
    named = [line.split()[1] for line in lines if line.startswith(("FAILED ", "ERROR "))]
    return named[0] if named else f"{path.relative_to(root)} (status {code})"


def _be_pytest(path: Path, root: Path, log: Path) -> None:
    """Run the tests of a file, and end the process."""
    import pytest

    sys.stdout = sys.stderr = log.open("w")
    for number in (1, 2):  # of what the tests start
        os.dup2(sys.stdout.fileno(), number)
    os.chdir(root)  # pytest names tests from where it was started
    code = 2
    try:
        code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-m", "not long", f"--rootdir={root}", str(path)])
    finally:
        sys.stdout.flush()
        os._exit(int(code))


def copy_checkout(target: Path) -> None:
    """What the tests need, without what was left by earlier runs."""
    ignored = shutil.ignore_patterns("__pycache__", ".*", "runs", "build", "*.egg-info")
    shutil.copytree(ROOT, target, ignore=ignored, dirs_exist_ok=True)


def prepare(root: Path) -> None:
    """Make this process one whose forks test the copy in `root`: heavy imports done, the copy first in the path."""
    settings = {"OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg", "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}
    os.environ.update(settings, PYTHONPATH=str(root), PYTHONDONTWRITEBYTECODE="1")
    # A file may be changed twice within a second to another one of the same size, which old bytecode would hide.
    sys.dont_write_bytecode = True
    import deepspeed  # noqa: F401
    import hypothesis  # noqa: F401
    import pytest  # noqa: F401
    import transformers  # noqa: F401

    assert not any(name.partition(".")[0] == PACKAGE for name in sys.modules), "the package must come from the copy"
    for name in [name for name in sys.modules if name.partition(".")[0] == "tools"]:
        del sys.modules[name]
    sys.path.insert(0, str(root))
    os.chdir(root)


def all_mutations(folders: Sequence[str]) -> list[tuple[str, Mutation]]:
    """(path below the checkout, change), in the order of paths and lines."""
    paths = [path for folder in folders for path in sorted((ROOT / PACKAGE / folder).rglob("*.py"))]
    return [(str(path.relative_to(ROOT)), each) for path in paths for each in mutations_of(path.read_text())]


def read_results(path: Path) -> list[Result]:
    """Of every mutation the newest one."""
    lines = path.read_text().splitlines() if path.exists() else []
    newest = {(each.file, each.line, each.kind, each.change): each for each in (Result(**json.loads(x)) for x in lines)}
    return list(newest.values())


def table(results: Sequence[Result]) -> Iterator[str]:
    """Markdown: counts by folder, then what survived."""
    yield "| folder | changes | noticed | survived |"
    yield "|---|---|---|---|"
    folders = Counter(result.file.split("/")[1] for result in results)
    alive = [result for result in results if result.by == SURVIVED]
    left = Counter(result.file.split("/")[1] for result in alive)
    for folder, count in sorted(folders.items()):
        yield f"| `{folder}` | {count} | {count - left[folder]} | {left[folder]} |"
    yield f"| all | {len(results)} | {len(results) - len(alive)} | {len(alive)} |"
    yield ""
    yield "| file | line | kind | change |"
    yield "|---|---|---|---|"
    for result in sorted(alive, key=lambda each: (each.file, each.line)):
        change = result.change.replace("|", "\\|")
        yield f"| `{result.file}` | {result.line} | {result.kind} | `{change}` |"


class Runner:
    """Tries changes in a copy of the checkout. files: of tests, at most, of a change. limit: seconds of one file."""

    def __init__(self, root: Path, below: Path, files: int, limit: float) -> None:
        self.root, self.below, self.files, self.limit = root, below, files, limit
        self.imports = Imports(root)
        self._passing: dict[Path, bool] = {}

    def run(self, file: str, mutation: Mutation) -> Result:
        """Make the change in the copy, run the nearest tests until one fails, and undo it."""
        path, began, by, ran = self.root / file, time.monotonic(), SURVIVED, 0
        source = path.read_text()
        for test in self.imports.nearest_tests(path, self.below)[: self.files]:
            path.write_text(mutation.apply(source))
            try:
                failed = run_test(test, self.root, self.limit)
            finally:
                path.write_text(source)
            ran += 1
            if failed and self.passes(test):
                by = failed
                break
        seconds = round(time.monotonic() - began, 1)
        return Result(file, mutation.line, mutation.kind, mutation.change, by, ran, seconds)

    def passes(self, test: Path) -> bool:
        """Whether the tests of a file pass on the code as it is; one that fails has nothing to say of a change."""
        # Asked of a file only once it has failed: most never do, and all together take longer than the sample.
        if test not in self._passing:
            failed = run_test(test, self.root, self.limit)
            self._passing[test] = not failed
            if failed:
                print(f"{failed} fails without a change too", flush=True)
        return self._passing[test]


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--folders", nargs="+", default=list(FOLDERS), help=f"of {PACKAGE}")
    parser.add_argument("--sample", type=int, default=300, help="how many changes, at random")
    parser.add_argument("--seed", type=int, default=11, help="of the sample")
    parser.add_argument("--skip", nargs="*", default=[], help="of the sample, files with one of these in their path")
    parser.add_argument("--tests", default="tests/unit", help="folder whose tests run")
    parser.add_argument("--files", type=int, default=6, help="test files a change at most, the nearest first")
    parser.add_argument("--limit", type=float, default=180.0, help="seconds that a test file may take")
    parser.add_argument("--again", action="store_true", help="also what survived before, as with more --files")
    parser.add_argument("--out", type=Path, required=True, help="results as JSON lines; those that are there stay")
    parser.add_argument("--table", action="store_true", help="run nothing, print the results")
    given = parser.parse_args(argv)
    results = read_results(given.out)
    if given.table:
        print("\n".join(table(results)))
        return
    everything = all_mutations(given.folders)
    chosen = random.Random(given.seed).sample(everything, min(given.sample, len(everything)))
    done = [each for each in results if each.by != SURVIVED or not given.again]
    tried = {(each.file, each.line, each.kind, each.change) for each in done}
    left = [
        (file, each)
        for file, each in chosen
        if (file, each.line, each.kind, each.change) not in tried and not any(part in file for part in given.skip)
    ]
    print(f"{len(chosen)} of {len(everything)} changes, {len(left)} of them to be tried", flush=True)
    out = given.out.absolute()
    with tempfile.TemporaryDirectory(prefix="mutate-") as folder:
        root = Path(folder).resolve()
        copy_checkout(root)
        prepare(root)
        runner = Runner(root, root / given.tests, given.files, given.limit)
        for file, mutation in left:
            result = runner.run(file, mutation)
            with out.open("a") as lines:
                lines.write(json.dumps(asdict(result)) + "\n")
            print(f"{file}:{result.line}  {result.change[:70]}  {result.by}  {result.seconds} s", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
