"""Imports point downward, and the heavy libraries have one owner each. Read from the source, so lazy imports count."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = "megatron_gemini"
FILES = sorted((ROOT / PACKAGE).rglob("*.py"))
# A package may import those of its own level that are named, and everything on the levels below.
LEVELS = (
    {"training": set(), "planning": set(), "evaluation": set()},
    {"objectives": {"training"}},
    {"generation": set()},
    {"engine": {"checkpoint"}, "checkpoint": {"engine"}},
    {"models": set()},
    {"modalities": set()},
    {"parallel": {"kernels"}, "kernels": set()},
    {"config": {"contracts"}, "contracts": set()},
)
DATA = {"contracts", "config", "data", "modalities"}
BUILDING = DATA | {"building"}
PREPROCESSING = {"preprocess", "tokenizer", "bad_sample", "encode", "video"}


def imported(path):
    """(line, dotted name) of every import in the file, wherever it stands."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            yield node.lineno, node.module
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def part(path):
    """The package of a file: "models", or "train" of the entry point train.py."""
    return path.relative_to(ROOT / PACKAGE).parts[0].removesuffix(".py")


def below(name):
    """Packages that `name` may import; None if it may import any (entry points)."""
    for number, level in enumerate(LEVELS):
        if name in level:
            return {name, *level[name], *(n for lower in LEVELS[number + 1 :] for n in lower)}
    return None


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_downward(path):
    name = part(path)
    allowed = {"data": DATA, "building": BUILDING}.get(name) or below(name)
    if allowed is None:
        return
    allowed = allowed | (
        {"data"} if name in ("training", "evaluation", "objectives", "generation", "engine", "checkpoint") else set()
    )
    for line, module in imported(path):
        if module.startswith(PACKAGE + "."):
            other = module.split(".")[1]
            assert other in allowed or other.startswith("__"), f"{path}:{line}: {name} imports {module}"


@pytest.mark.parametrize("path", [p for p in FILES if part(p) in ("data", "building")], ids=lambda p: p.name)
def test_data_reads_only_the_preprocessing_of_the_modalities(path):
    for line, module in imported(path):
        pieces = module.split(".")
        if pieces[:2] == [PACKAGE, "modalities"] and len(pieces) > 3:
            assert PREPROCESSING & set(pieces[2:]), f"{path}:{line}: data imports {module}"


@pytest.mark.parametrize(
    ("library", "owners"),
    [("deepspeed", {"engine", "checkpoint"}), ("megatron", {"parallel"}), ("transformers", set()), ("sklearn", set())],
)
def test_a_heavy_library_has_its_owners(library, owners):
    for path in FILES:
        for line, module in imported(path):
            if module.split(".")[0] == library:
                assert part(path) in owners, f"{path}:{line}: {part(path)} imports {module}"


@pytest.mark.parametrize("path", [p for p in FILES if part(p) == "config"], ids=lambda p: p.name)
def test_the_configuration_needs_only_the_standard_library_and_its_own_parsers(path):
    """At import: what reads YAML and the command line may import its parser where it uses it."""
    for node in ast.parse(path.read_text()).body:
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        for name in names:
            top = name.split(".")[0]
            own = name.startswith((f"{PACKAGE}.config", f"{PACKAGE}.contracts"))
            assert own or top in sys.stdlib_module_names or top in ("yaml", "tyro"), f"{path}:{node.lineno}: {name}"


def test_the_configuration_is_there_without_torch():
    code = "import sys, megatron_gemini.config.run; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
