"""The tool that changes the code: what it changes, which tests it runs, and that it undoes what it did."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tools import mutate
from tools.mutations import mutations_of
from tools.nearest_tests import Imports, named_in


def changes(source: str) -> set[tuple[str, str]]:
    return {(each.kind, each.change) for each in mutations_of(source)}


@pytest.mark.parametrize(
    ("source", "kind", "change"),
    [
        ("a < b", "comparison", "a < b -> (a <= b)"),
        ("a is not b", "comparison", "a is not b -> (a is b)"),
        ("a * b", "arithmetic", "a * b -> (a / b)"),
        ("-a", "arithmetic", "-a -> (a)"),
        ("x = 3", "constant", "3 -> 4"),
        ("x = 3", "constant", "3 -> 2"),
        ("x = True", "boolean", "True -> False"),
        ("a and b", "boolean", "a and b -> (a or b)"),
        ("not a", "boolean", "not a -> (a)"),
        ("if f(a):\n    b()", "boolean", "f(a) -> (not f(a))"),
        ("f(a, key=b)", "keyword", "f(a, key=b) -> (f(a))"),
        ("f(a, b)", "swap", "f(a, b) -> (f(b, a))"),
        ("f(a)", "statement", "f(a) -> pass"),
        ("a.b = c", "statement", "a.b = c -> pass"),
        ("a += c", "statement", "a += c -> pass"),
        ("a[b:c]", "slice", "b:c -> :c"),
        ("a[b:c]", "slice", "b:c -> b:"),
    ],
)
def test_each_kind_of_change(source: str, kind: str, change: str) -> None:
    assert (kind, change) in changes(source)


@pytest.mark.parametrize(
    "source",
    [
        '"""A docstring of 3."""',
        "assert a < 3",
        "from a import b",
        "x: Literal[3]",
        "def f(a: Literal[1]) -> Literal[2]: ...",
        "if TYPE_CHECKING:\n    x = 3",
        "x = f'{a + 3}'",
    ],
)
def test_what_is_left_alone(source: str) -> None:
    assert not changes(source)


@pytest.mark.parametrize("file", ["mutate.py", "mutations.py", "nearest_tests.py"])
def test_every_change_is_python_of_one_place(file: str) -> None:
    source = (mutate.ROOT / "tools" / file).read_text()
    found = mutations_of(source)
    assert len(found) > 20
    for each in found:
        changed = each.apply(source)
        assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse(source)), each
        assert changed.splitlines()[: each.line - 1] == source.splitlines()[: each.line - 1]


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_the_nearest_tests_come_first_also_over_strings(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "megatron_gemini/models/head.py": "",
            "megatron_gemini/models/whole.py": "from megatron_gemini.models import head",
            "megatron_gemini/table.py": 'NAMES = {"x": "megatron_gemini.models.whole:X"}',
            "megatron_gemini/other.py": "",
            "tests/unit/test_far.py": "import megatron_gemini.table",
            "tests/unit/models/test_whole.py": "from megatron_gemini.models.whole import X",
            "tests/unit/data/test_a.py": "import megatron_gemini.models.head",
            "tests/unit/models/test_b.py": "import megatron_gemini.models.head",
            "tests/unit/models/test_head.py": "import megatron_gemini.models.head",
            "tests/unit/models/test_other.py": "import megatron_gemini.other",
            "tests/distributed/test_head.py": "import megatron_gemini.models.head",
        },
    )
    found = Imports(tmp_path).nearest_tests(tmp_path / "megatron_gemini/models/head.py", tmp_path / "tests/unit")
    names = [str(path.relative_to(tmp_path / "tests/unit")) for path in found]
    assert names == ["models/test_head.py", "models/test_b.py", "data/test_a.py", "models/test_whole.py", "test_far.py"]


def test_a_change_is_tried_until_a_test_fails_that_passes_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["first", "second", "third", "fourth"]
    source = "megatron_gemini/models/a.py"
    write(tmp_path, {f"tests/unit/test_{place}_{name}.py": "" for place, name in enumerate(names)})
    write(tmp_path, {source: "x = 3\n"})
    seen = []

    def run(path: Path, root: Path, limit: float) -> str:
        name, content = path.stem.rpartition("_")[2], (root / source).read_text()
        seen.append((name, content))
        return "it::fails" if name == "second" or (name == "third" and content != "x = 3\n") else ""

    monkeypatch.setattr(mutate, "run_test", run)
    monkeypatch.setattr(Imports, "nearest_tests", lambda self, file, below: sorted(below.glob("*.py")))
    runner = mutate.Runner(tmp_path, tmp_path / "tests/unit", files=4, limit=1.0)
    (down, _) = mutations_of("x = 3\n")
    killed = runner.run(source, down)
    assert seen == [("first", "x = 2\n"), *[(n, f"x = {v}\n") for n in ("second", "third") for v in (2, 3)]]
    assert (killed.by, killed.tests, (tmp_path / source).read_text()) == ("it::fails", 3, "x = 3\n")
    runner.files = 2
    survivor = runner.run(source, down)
    assert (survivor.by, survivor.tests) == (mutate.SURVIVED, 2)


@pytest.mark.parametrize(
    ("test", "limit", "found"),
    [
        ("def test_a():\n    pass", 60.0, ""),
        ("def test_a():\n    assert False", 60.0, "test_one.py::test_a"),
        ("import nothing_like_it", 60.0, "test_one.py"),
        ("import time\ndef test_a():\n    time.sleep(60)", 0.5, "time limit of test_one.py"),
    ],
)
def test_how_a_file_of_tests_ends(tmp_path: Path, test: str, limit: float, found: str) -> None:
    write(tmp_path, {"test_one.py": test, "pyproject.toml": ""})
    assert mutate.run_test(tmp_path / "test_one.py", tmp_path, limit) == found


def test_the_table_has_counts_and_survivors() -> None:
    results = [
        mutate.Result("megatron_gemini/models/a.py", 7, "swap", "f(a | b, c) -> f(c, a | b)", mutate.SURVIVED, 2, 1.0),
        mutate.Result("megatron_gemini/models/a.py", 3, "swap", "x", "test_a.py::test_b", 1, 1.0),
    ]
    lines = list(mutate.table(results))
    assert "| `models` | 2 | 1 | 1 |" in lines
    assert lines[-1] == "| `megatron_gemini/models/a.py` | 7 | swap | `f(a \\| b, c) -> f(c, a \\| b)` |"


def test_a_place_that_the_registry_writes_in_two_parts_is_found() -> None:
    source = '_M = "megatron_gemini.modalities"\nENTRIES = {"x": f"{_M}.text.spec:TEXT"}\n'
    there = {"megatron_gemini.modalities.text.spec": Path("spec.py")}
    assert named_in(source, there) == set(there)
