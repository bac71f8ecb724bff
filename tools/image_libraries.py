"""Keep what a container image brings: write its libraries down before an installation and compare them afterwards.

    python tools/image_libraries.py record image.txt     # before: a file that pip takes as constraints (-c image.txt)
    python tools/image_libraries.py check image.txt      # after: fails when one was replaced or is missing

It imports nothing of the package and no library that needs a GPU: a container is built without one.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import sys
from pathlib import Path

REQUIRED = ("torch", "apex", "transformer_engine", "flash_attn")
"""Distributions, which are also the modules, that the image must bring."""
KEPT = (*REQUIRED, "triton", "pytorch_triton", "numpy")
APEX_MODULES = ("apex.normalization", "amp_C")
"""NVIDIA's Apex has them; the package named apex on PyPI, which is something else, does not."""


def installed(distribution: str) -> str | None:
    """Version of an installed distribution, None if it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def has_module(name: str) -> bool:
    """Whether a module is there to import; only its parents are imported."""
    try:
        return importlib.util.find_spec(name) is not None
    except ImportError:
        return False


def missing() -> list[str]:
    """Modules that the image should have and has not."""
    return [name for name in (*REQUIRED, *APEX_MODULES) if not has_module(name)]


def changed(recorded: dict[str, str]) -> list[str]:
    """One line for every recorded distribution whose version is another now."""
    return [
        f"{name} was {version} and is {installed(name) or 'gone'}"
        for name, version in recorded.items()
        if installed(name) != version
    ]


def record(path: Path) -> None:
    versions = ((name, installed(name)) for name in KEPT)
    path.write_text("".join(f"{name}=={version}\n" for name, version in versions if version))


def check(path: Path) -> list[str]:
    """What is wrong, one line each; empty when nothing is."""
    pairs = (line.split("==", 1) for line in path.read_text().splitlines())
    return [*(f"{name} is missing from the image" for name in missing()), *changed(dict(pairs))]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("record", "check"))
    parser.add_argument("file", type=Path)
    options = parser.parse_args(arguments)
    if options.action == "record":
        record(options.file)
        return 0
    problems = check(options.file)
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
