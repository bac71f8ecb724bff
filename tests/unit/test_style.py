"""What CONTRIBUTING.md asks of the style, as far as it can be counted (`tests/style_counts.py` counts it)."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

from tests.style_counts import Sentence, count, docstring_sentences, docstrings, document_sentences

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "megatron_gemini"
FILES = sorted(PACKAGE.rglob("*.py"))
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LONGEST_SENTENCE = 35  # words
LONGEST_FUNCTION = 70  # lines
LONG_FUNCTIONS: dict[str, str] = {}
"""Why a function is longer, by `file:name`."""
# Stems, so that normalised and normaliser are found too. What follows is American: -ize, -or, -er, one l.
BRITISH = (
    r"(?:normal|token|initial|serial|optim|organ|recogn|quant|util|synchron|general|summar|parallel|emphas|memor"
    r"|minim|maxim|visual|real|author|categor|character|custom|final|local|random|special|standard|categor)is(?:e|ed|es"
    r"|er|ers|ing|ation|ations)\b|colour|behaviour|neighbour|favour|honour|labour|\bcentre|analys(?:e|ed|es|ing)\b"
    r"|\bcatalogue|\bartefact|\blicence|\bdefence|modell(?:ed|ing)|labell(?:ed|ing)|travell(?:ed|ing)|cancell(?:ed|ing)"
    r"|\bwhilst\b|\blearnt\b|\bspelt\b|\bfulfil\b|\bprogramme\b"
)


def ids(path: Path) -> str:
    return str(path.relative_to(ROOT))


def tracked() -> list[Path]:
    """Text files of the project, those that are new included; without this file, which has the words."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    names = listed.stdout.split() if listed.returncode == 0 else [ids(path) for path in [*FILES, *DOCUMENTS]]
    kinds = (".py", ".md", ".sh", ".yaml", ".toml", ".slurm")
    found = [ROOT / name for name in names if name.endswith(kinds)]
    return [path for path in found if path.exists() and path != Path(__file__)]


def too_long(sentences: list[Sentence]) -> list[str]:
    return [
        f"line {line}, {len(words)} words: {' '.join(words[:12])} ..."
        for line, words in sentences
        if len(words) > LONGEST_SENTENCE
    ]


def test_annotations_say_a_type():
    counts = count(PACKAGE)
    assert counts.untyped * 1000 < 2 * counts.lines, f"{counts.untyped} say nothing in {counts.lines} lines"


def test_reasons_are_written_down():
    counts = count(PACKAGE)
    assert counts.comments * 100 >= 4 * counts.lines, f"{counts.comments} comments in {counts.lines} lines"


def test_functions_are_not_splinters():
    counts = count(PACKAGE)
    assert counts.functions * 1000 <= 62 * counts.lines, f"{counts.functions} functions in {counts.lines} lines"


def test_functions_fit_on_a_screen():
    found = {
        f"{ids(path)}:{node.name}": (node.end_lineno or 0) - node.lineno + 1
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    }
    longer = {name: lines for name, lines in found.items() if lines > LONGEST_FUNCTION}
    assert longer.keys() <= LONG_FUNCTIONS.keys(), longer


def test_every_class_has_a_name_of_its_own():
    """Who reads one of two is sure to look at the other first."""
    found: dict[str, list[str]] = {}
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                found.setdefault(node.name, []).append(ids(path))
    assert not {name: places for name, places in found.items() if len(places) > 1}


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_sentences_of_docstrings_are_short(path):
    found = [each for text in docstrings(ast.parse(path.read_text())) for each in too_long(docstring_sentences(text))]
    assert not found, "\n".join([f"{ids(path)} (lines of the docstring)", *found])


@pytest.mark.parametrize("path", DOCUMENTS, ids=ids)
def test_sentences_of_documents_are_short(path):
    found = too_long(document_sentences(path.read_text()))
    assert not found, "\n".join([ids(path), *found])


def test_spelling_is_american():
    found = [
        f"{ids(path)}:{number}: {match.group()}"
        for path in tracked()
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1)
        for match in re.finditer(BRITISH, line, re.I)
    ]
    assert not found, "\n".join(found)


def test_no_file_is_called_by_what_it_is_not():
    """A name that says nothing invites everything: what is in such a file belongs to what uses it."""
    assert not [ids(path) for path in FILES if path.stem in ("utils", "util", "helpers", "misc", "common")]


@pytest.mark.parametrize(
    ("text", "lengths"),
    [
        ("One two. Three four five.", [2, 3]),
        ("One two\nthree. Four.", [3, 1]),
        ('He said "one two." Then three.', [4, 2]),
        ("Cases: One is this; two is that.", [1, 6]),
        ("Read `a b c` and [d e](f.md).", [5]),
        ("Text.\n\n- one two\n- three\n  four\n\n1. five", [1, 2, 2, 1]),
        ("# Heading words here\n\nText is short.\n\n| a | b c |\n|---|---|\n", [3]),
        ("Run\n\n    python -m one two three\n\nand see.", [1, 2]),
        ("A row.\n\n```yaml\nkey: value of it\n```\n\nIts end.", [2, 2]),
        ("In 2022. Then\n128. is no item.", [2, 2, 3]),
        ("- **Bold.** Then two.", [1, 2]),
    ],
)
def test_sentences_of_a_document_are_told_apart(text, lengths):
    assert [len(words) for _, words in document_sentences(text)] == lengths


def test_sentences_of_a_docstring_begin_at_arguments_and_skip_code():
    text = """What it does.

    first: one of these
        or those. second, third: the others.
    fourth: none

        python -m this is code

    Raises ValueError.
    """
    assert [len(words) for _, words in docstring_sentences(text)] == [3, 6, 4, 2, 2]
