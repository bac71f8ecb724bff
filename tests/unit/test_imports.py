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
# The order of the packages, from above to below: a package may import everything on the levels below its own, and of
# its own level those that are named. What is on no level, the entry points, may import anything.
LEVELS = (
    {"training": set(), "planning": set(), "evaluation": set()},
    {"objectives": set()},
    {"generation": set()},
    {"engine": {"checkpoint"}, "checkpoint": {"engine"}},
    {"models": set()},
    {"connectors": {"modalities"}, "modalities": set()},
    {"parallel": {"kernels"}, "kernels": set()},
    {"config": set()},
    {"registry": set(), "plugins": set()},
    {"contracts": set(), "exit_status": set()},
)
ENTRY_POINTS = {"checkpoint_command", "cli", "train", "generate", "evaluate", "plan"}
# Data stand beside the levels: they know of modalities how items are read, and of connectors how long runs become.
DATA = {"contracts", "config", "registry", "plugins", "data", "modalities", "connectors"}
READERS_OF_DATA = {"training", "evaluation", "objectives", "generation", "engine", "checkpoint"}
BUILDING = DATA | {"building"}
READING = {"spec", "item", "preprocess", "tokenizer", "bad_sample", "encode", "mp4_index"}


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
    if name in ("data", "building"):
        return DATA if name == "data" else BUILDING
    for number, level in enumerate(LEVELS):
        if name in level:
            data = {"data"} if name in READERS_OF_DATA else set()
            return {name, *level[name], *data, *(n for lower in LEVELS[number + 1 :] for n in lower)}
    assert name in ENTRY_POINTS or name == "__init__", f"{name} has no level"
    return None


def only_for_types(path):
    """Lines of the imports that stand below `if TYPE_CHECKING`."""
    blocks = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.If)]
    blocks = [n for n in blocks if isinstance(n.test, ast.Name) and n.test.id == "TYPE_CHECKING"]
    return {line for block in blocks for each in block.body for line in range(each.lineno, each.end_lineno + 1)}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_downward(path):
    """Also those for types alone, but in the registry: it lies below everything and names everything."""
    allowed = below(part(path))
    if allowed is None:
        return
    excused = only_for_types(path) if part(path) == "registry" else set()
    for line, module in imported(path):
        if module.startswith(PACKAGE + ".") and line not in excused:
            other = module.split(".")[1]
            assert other in allowed or other.startswith("__"), f"{path}:{line}: {part(path)} imports {module}"


@pytest.mark.parametrize("path", [p for p in FILES if part(p) in ("data", "building")], ids=lambda p: p.name)
def test_data_read_specs_and_preprocessing_and_no_model(path):
    for line, module in imported(path):
        pieces = module.split(".")
        package, inner = ".".join(pieces[:2]), set(pieces[2:])
        if package == f"{PACKAGE}.modalities" and inner and not is_package(module):
            assert inner & READING, f"{path}:{line}: data import {module}"
        if package == f"{PACKAGE}.connectors" and inner and not is_package(module):
            assert "spec" in inner, f"{path}:{line}: data import {module}"


def is_package(module):
    return (ROOT / module.replace(".", "/")).is_dir()


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
            own = name in (PACKAGE, f"{PACKAGE}.contracts", f"{PACKAGE}.registry") or name.startswith(
                f"{PACKAGE}.config"
            )
            assert own or top in sys.stdlib_module_names or top in ("yaml", "tyro"), f"{path}:{node.lineno}: {name}"


def test_the_configuration_is_there_without_torch():
    code = "import sys, megatron_gemini.config.run; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_all_specs_and_the_planner_are_there_without_torch_and_without_a_media_library():
    code = """
import importlib.abc, sys

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "numpy", "av", "soundfile", "soxr", "PIL", "deepspeed", "megatron"):
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Refuse())
from megatron_gemini import registry
from megatron_gemini.config.load import load_config
from megatron_gemini.planning.search import search

found = [(name, each) for name, each in vars(registry).items() if isinstance(each, registry.Registry)]
for name, each in found:
    if name in SPECS:
        assert [entry.name for entry in each.entries()] == list(each.names), name
load_config([])
print(len(found))
"""
    specs = ("ENCODERS", "MODALITIES", "CONNECTORS", "OBJECTIVES")
    result = subprocess.run(
        [sys.executable, "-c", f"SPECS = {specs!r}\n{code}"], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) >= len(specs)
