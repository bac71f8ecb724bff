"""Which tests are nearest to a file of the package, by the imports between them.

python -m tools.nearest_tests megatron_gemini/kernels/rope.py
"""

from __future__ import annotations

import ast
import sys
from collections import deque
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = "megatron_gemini"


def module_of(path: Path, root: Path) -> str:
    """Dotted name of a file below `root`."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def named_in(source: str, modules: Mapping[str, Path]) -> set[str]:
    """Modules among `modules` that a file imports, or names in a string, as the registry and launched tests do."""
    found: set[str] = set()
    tree = ast.parse(source)
    # The registry writes places as f"{_M}.image.spec:IMAGE", with _M a constant of the same file.
    texts = {
        target.id: each.value.value
        for each in tree.body
        if isinstance(each, ast.Assign) and isinstance(each.value, ast.Constant) and isinstance(each.value.value, str)
        for target in each.targets
        if isinstance(target, ast.Name)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.update([node.module, *(f"{node.module}.{alias.name}" for alias in node.names)])
        elif isinstance(node, ast.JoinedStr):
            parts = [part.value if isinstance(part, ast.FormattedValue) else part for part in node.values]
            words = [texts.get(part.id, "") if isinstance(part, ast.Name) else "" for part in parts]
            written = [str(part.value) if isinstance(part, ast.Constant) else "" for part in parts]
            joined = "".join(a or b for a, b in zip(words, written, strict=True))
            found.add(joined.partition(":")[0])
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value.partition(":")[0])
    return found & set(modules)


class Imports:
    """Which test files lead to a file, and over how many imports."""

    def __init__(self, root: Path) -> None:
        files = [*(root / PACKAGE).rglob("*.py"), *(root / "tests").rglob("*.py"), *(root / "tools").rglob("*.py")]
        self.modules = {module_of(path, root): path for path in files}
        self.root = root
        self.importers: dict[str, set[str]] = {name: set() for name in self.modules}
        for name, path in self.modules.items():
            for imported in named_in(path.read_text(), self.modules) - {name}:
                self.importers[imported].add(name)

    def nearest_tests(self, file: Path, below: Path) -> list[Path]:
        """Test files of the folder `below`, fewest steps first; of equally many, the one most like it by name."""
        start = module_of(file, self.root)
        steps, waiting = {start: 0}, deque([start])
        while waiting:
            name = waiting.popleft()
            for importer in sorted(self.importers[name] - steps.keys()):
                steps[importer] = steps[name] + 1
                waiting.append(importer)
        found = [(steps[name], path) for name, path in self.modules.items() if name in steps]
        tests = [(far, path) for far, path in found if path.name.startswith("test_") and path.is_relative_to(below)]
        folder, words = file.relative_to(self.root / PACKAGE).parts[0], set(file.stem.split("_"))

        def unlike(test: Path) -> tuple[bool, int]:
            return folder not in test.parts, -len(words & set(test.stem.split("_")))

        return [path for far, path in sorted(tests, key=lambda each: (each[0], unlike(each[1]), each[1]))]


if __name__ == "__main__":
    for given in sys.argv[1:]:
        for test in Imports(ROOT).nearest_tests(Path(given).absolute(), ROOT / "tests"):
            print(test.relative_to(ROOT))
