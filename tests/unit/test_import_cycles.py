"""No two modules import each other, directly or through others. Read from the source, so lazy imports count.

What stands under `if TYPE_CHECKING:` does not: it never runs, and the registry names in it what lies above it.
"""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = "megatron_gemini"


def module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def import_graph(folder: Path, root: Path) -> dict[str, set[str]]:
    """By module of the folder: the modules of the folder that it imports, at its head or in a function."""
    files = {module_name(path, root): path for path in folder.rglob("*.py")}
    graph: dict[str, set[str]] = {}
    for name, path in files.items():
        found: set[str] = set()
        tree = ast.parse(path.read_text())
        unused = typing_only(tree)
        for node in ast.walk(tree):
            if id(node) in unused:
                continue
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                # What is imported from a package is a module of it, or else a name of its __init__.
                members = {f"{node.module}.{alias.name}": str(node.module) for alias in node.names}
                found |= {member if member in files else module for member, module in members.items()}
        graph[name] = (found & files.keys()) - {name}
    return graph


def typing_only(tree: ast.AST) -> set[int]:
    """Ids of the nodes below `if TYPE_CHECKING:`."""
    blocks = [n for n in ast.walk(tree) if isinstance(n, ast.If) and ast.unparse(n.test).endswith("TYPE_CHECKING")]
    return {id(node) for block in blocks for statement in block.body for node in ast.walk(statement)}


def find_cycle(graph: dict[str, set[str]]) -> list[str]:
    """The modules of one cycle, the first of them again at the end; [] if there is none."""
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name not in done:
            for other in sorted(graph[name]):
                if cycle := visit(other, [*path, name]):
                    return cycle
            done.add(name)
        return []

    return next((cycle for name in sorted(graph) if (cycle := visit(name, []))), [])


def test_no_module_imports_one_that_imports_it():
    assert not (cycle := find_cycle(import_graph(ROOT / PACKAGE, ROOT))), " -> ".join(cycle)


def test_a_cycle_through_a_function_and_a_package_is_found(tmp_path):
    files = {
        "p/__init__.py": "",
        "p/a.py": "from p import b",
        "p/b.py": "import p.sub",
        "p/sub/__init__.py": "def f():\n    from p.sub.c import g",
        "p/sub/c.py": "from p.a import x",
        "p/apart.py": "from p.a import x\nimport os",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert find_cycle(import_graph(tmp_path / "p", tmp_path)) == ["p.a", "p.b", "p.sub", "p.sub.c", "p.a"]
    (tmp_path / "p/sub/c.py").write_text("from p.apart import x")
    assert find_cycle(import_graph(tmp_path / "p", tmp_path))[0] == "p.a"
    (tmp_path / "p/sub/c.py").write_text("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import p.a")
    assert find_cycle(import_graph(tmp_path / "p", tmp_path)) == []
    (tmp_path / "p/sub/c.py").write_text("import os.path")
    assert find_cycle(import_graph(tmp_path / "p", tmp_path)) == []
