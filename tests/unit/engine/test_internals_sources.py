"""Only engine/internals/ touches DeepSpeed's internals, and nothing that is not on its list. Read from the source."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed import ProcessGroup

from megatron_gemini.engine.internals import release, types

PACKAGE = Path(types.__file__).parents[2]
INTERNALS = Path(types.__file__).parent
LIST = INTERNALS / "types.py"
OUTSIDE = [p for p in sorted(PACKAGE.rglob("*.py")) if INTERNALS not in p.parents]
CLASSES = [one for one in vars(types).values() if inspect.isclass(one) and one.__module__ == types.__name__]
LISTED = {name for one in CLASSES for name in release.members(one)}
NOT_DEEPSPEEDS = (torch.Tensor, torch.optim.SGD([torch.zeros(1)]), nn.Module, ProcessGroup, dict, list, set, str, type)
# Public, or words that others use for something else.
COMMON = set(release.members(types.DeepSpeedEngine)) - {"clip_fp32_gradients"}
COMMON |= {"start", "numel", "id", "wait", "partition", "zero_grad", "offload_optimizer"}


def attributes(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, name) of every attribute that is read or set, by a dot or by getattr and its like."""
    modules = {alias.asname or alias.name.split(".")[0] for alias in imports(tree)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and root(node) not in modules:
            yield node.lineno, node.attr
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in (
            "getattr",
            "setattr",
            "hasattr",
            "delattr",
        ):
            name = node.args[1]
            if isinstance(name, ast.Constant):
                yield node.lineno, name.value


def imports(tree: ast.AST) -> Iterator[ast.alias]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield from node.names


def root(node: ast.expr) -> str:
    """The name that a chain of attributes begins with; "" if it begins with something else."""
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else ""


def own(tree: ast.AST) -> set[str]:
    """Names that the file itself gives to methods and attributes."""
    names = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    names |= {
        node.target.id
        for node in ast.walk(tree)
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and root(node) == "self":
            names.add(node.attr)
    return names


SOURCES = {path.name: ast.parse(path.read_text()) for path in sorted(INTERNALS.glob("*.py")) if path != LIST}
OWN = set().union(*(own(tree) for tree in SOURCES.values())) | {n for one in NOT_DEEPSPEEDS for n in dir(one)}


def unlisted(tree: ast.AST) -> list[tuple[int, str]]:
    return [(line, name) for line, name in attributes(tree) if name not in LISTED | OWN and not name.startswith("__")]


@pytest.mark.parametrize("name", SOURCES)
def test_every_attribute_of_deepspeed_that_is_used_is_on_the_list(name):
    assert not unlisted(SOURCES[name])


def test_a_new_use_is_found():
    new = "optimizer.a_new_thing()\nhasattr(optimizer, 'another_one')\noptimizer.get_param_id(parameter)"
    assert sorted(unlisted(ast.parse(new))) == [(1, "a_new_thing"), (2, "another_one")]


@pytest.mark.parametrize("name", SOURCES)
def test_every_name_that_is_imported_of_deepspeeds_modules_is_on_the_list(name):
    for node in ast.walk(SOURCES[name]):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("deepspeed."):
            for alias in node.names:
                listed = release.MODULES.get(f"{node.module}.{alias.name}") or release.MODULES[node.module]
                here = [n for n in ast.walk(SOURCES[name]) if isinstance(n, ast.Attribute) and root(n) == alias.name]
                used = {n.attr for n in here} or {alias.name}
                assert used <= {part for entry in listed for part in entry.split(".")}, (node.module, used)


def test_everything_on_the_list_is_used():
    used = {name for tree in SOURCES.values() for _, name in attributes(tree)}
    calls = {name for path in (PACKAGE / "engine").glob("*.py") for _, name in attributes(ast.parse(path.read_text()))}
    assert not LISTED - used - calls


@pytest.mark.parametrize("path", OUTSIDE, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_other_file_touches_deepspeeds_internals(path):
    tree = ast.parse(path.read_text())
    mentioned = {*attributes(tree)}
    mentioned |= {
        (n.lineno, n.value) for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)
    }
    private = [(line, name) for line, name in mentioned if name.startswith("ds_") or name in LISTED - COMMON]
    assert not [f"{path}:{line}: {name}" for line, name in private]
    modules = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    modules |= {n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert not [name for name in modules if name.startswith(("deepspeed.runtime", "deepspeed.utils"))]
