"""What is counted of the code's style, from the syntax tree: untyped annotations, comments, functions, long sentences.

python -m tests.style_counts                       # the whole package
python -m tests.style_counts megatron_gemini/data  # one folder
"""

from __future__ import annotations

import ast
import inspect
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
BARE = ("object", "dict", "list", "Callable")
"""Names that say nothing of what they hold where they stand without parameters."""


@dataclass
class Counts:
    """Sums over files. untyped: `Any` anywhere, and the names of `BARE` without parameters in annotations."""

    lines: int = 0
    comments: int = 0
    functions: int = 0
    untyped: int = 0
    longest_function: int = 0
    longest_sentence: int = 0

    def add(self, path: Path) -> None:
        text = path.read_text()
        tree = ast.parse(text)
        functions = [n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
        self.lines += text.count("\n")
        self.comments += comment_lines(text)
        self.functions += len(functions)
        self.untyped += len(untyped(tree))
        lengths = [(f.end_lineno or f.lineno) - f.lineno + 1 for f in functions]
        self.longest_function = max([self.longest_function, *lengths])
        sentences = [len(each.words) for doc in docstrings(tree) for each in docstring_sentences(doc)]
        self.longest_sentence = max([self.longest_sentence, *sentences])

    def __str__(self) -> str:
        thousand = max(self.lines, 1) / 1000
        return (
            f"{self.lines} lines, {self.functions / thousand:.1f} functions and {self.untyped / thousand:.2f} untyped "
            f"annotations a thousand ({self.untyped}), {self.comments / thousand / 10:.1f}% comments, longest function "
            f"{self.longest_function} lines, longest sentence of a docstring {self.longest_sentence} words"
        )


def annotations(tree: ast.AST) -> list[ast.expr]:
    """Every annotation of the tree: of arguments, returns and variables."""
    found: list[ast.expr | None] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.arg):
            found.append(node.annotation)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            found.append(node.returns)
        elif isinstance(node, ast.AnnAssign):
            found.append(node.annotation)
    return [node for node in found if node is not None]


def untyped(tree: ast.AST) -> list[int]:
    """Lines of the names that stand for any type."""
    lines = [n.lineno for n in ast.walk(tree) if isinstance(n, ast.Name) and n.id == "Any"]
    for annotation in annotations(tree):
        parameterized = {id(n.value) for n in ast.walk(annotation) if isinstance(n, ast.Subscript)}
        lines += [
            n.lineno
            for n in ast.walk(annotation)
            if isinstance(n, ast.Name) and n.id in BARE and id(n) not in parameterized
        ]
    return sorted(lines)


def comment_lines(text: str) -> int:
    """Lines with a comment that a person reads; directives to tools do not count."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    comments = [t for t in tokens if t.type == tokenize.COMMENT]
    return len({t.start[0] for t in comments if not re.match(r"#\s*(noqa|type:|ruff:|!)", t.string)})


def docstrings(tree: ast.AST) -> list[str]:
    """Docstrings of modules, classes and functions, and the strings that stand below a variable."""
    return [
        node.value.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    ]


class Sentence(NamedTuple):
    """A sentence of prose. line: of its paragraph's first line in the text, from 1."""

    line: int
    words: tuple[str, ...]


_ITEM = r"(?:[-*] |\d{1,2}\. )"  # of a list
_FIELD = r"[\w.]+(?:, \w+)*: "  # of a docstring: an argument, or several of them


def docstring_sentences(text: str) -> list[Sentence]:
    """The sentences of a docstring; every item of a list, and every argument, begins a new one."""
    return _sentences(inspect.cleandoc(text), rf"{_ITEM}|{_FIELD}")


def document_sentences(text: str) -> list[Sentence]:
    """The sentences of a Markdown document, without its tables, headings, code blocks, images and comments."""
    for part in (r"```.*?```", r"<!--.*?-->", r"!\[[^\]]*\]\([^)]*\)"):
        text = re.sub(part, lambda found: "\n" * found.group().count("\n"), text, flags=re.S)
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"^\s*[|#].*$", "", text, flags=re.M)
    return _sentences(text.replace("**", ""), _ITEM)


def _sentences(text: str, begins: str) -> list[Sentence]:
    """begins: what begins a sentence of its own at the start of a line. Code in backquotes is one word."""
    text = re.sub(r"`[^`]*`", lambda found: "code" + "\n" * found.group().count("\n"), text)
    return [
        Sentence(number, words)
        for number, plain in _paragraphs(text, begins)
        for sentence in _ENDS.split(plain)
        if (words := tuple(word for word in sentence.split() if re.search(r"\w", word)))
    ]


# An end, also within a quotation or parentheses. A colon or a semicolon ends one where a capital, a quotation or a
# number follows, as in a list of cases that stands in one line.
_ENDS = re.compile(r"(?:(?<=[.!?])|(?<=[.!?][\"')]))\s+|(?<=[:;])\s+(?=[\"'(A-Z0-9])")


def _paragraphs(text: str, begins: str) -> Iterator[tuple[int, str]]:
    """(number of the first line, text in one line) of every paragraph, without indented blocks of code."""
    first, lines, code, after_blank = 0, list[str](), False, True
    for number, line in enumerate([*text.split("\n"), ""], 1):
        blank, item = not line.strip(), re.match(rf"\s*(?:{begins})", line)
        if not blank:
            code = line.startswith("    ") and (code or (after_blank and not item))
        if lines and (blank or item or code):
            yield first, " ".join(" ".join(lines).split())
            lines = []
        after_blank = blank
        if not blank and not code:
            first = first if lines else number
            lines.append(re.sub(rf"^\s*{_ITEM}", "", line))


def count(*folders: Path) -> Counts:
    """Of all Python files below the folders."""
    counts = Counts()
    for folder in folders:
        for path in sorted(folder.rglob("*.py")) if folder.is_dir() else [folder]:
            counts.add(path)
    return counts


if __name__ == "__main__":
    chosen = [Path(name).resolve() for name in sys.argv[1:]] or [ROOT / "megatron_gemini"]
    for folder in chosen:
        print(f"{folder.relative_to(ROOT)}: {count(folder)}")
    if len(sys.argv) == 1:
        for room in sorted(p for p in (ROOT / "megatron_gemini").iterdir() if p.name != "__pycache__"):
            if room.is_dir() or room.suffix == ".py":
                print(f"{room.name}: {count(room)}")
