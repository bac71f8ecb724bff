"""What documents say of the code is so: examples, links, paths, settings and commands."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_gemini.config.run import RunConfig
from megatron_gemini.config.schema import Section, below, names_below

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
EXTENDING = ROOT / "docs/extending.md"
SUFFIXES = r"\.(?:py|sh|yaml|json|md|png|slurm|txt|toml)"
TOP = ("docs", "examples", "megatron_gemini", "tests", "tools")
EXAMPLE = re.compile(r"`([^`\n]+)`:\n\n```python\n(.*?)\n```", re.S)


def ids(path: Path) -> str:
    return str(path.relative_to(ROOT))


def code_of(text: str) -> list[str]:
    """What stands as code in a document: in backquotes, in fences, and in lines that are indented by four."""
    fences = re.findall(r"```\w*\n(.*?)```", text, re.S)
    rest = re.sub(r"```.*?```", "", text, flags=re.S)
    return [*fences, *re.findall(r"`([^`]+)`", rest), *re.findall(r"^    (.*)$", rest, re.M)]


def links(text: str) -> Iterator[tuple[str, str]]:
    """(file, heading) of every link that is no address; either may be empty."""
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", text, flags=re.S)):
        if "://" not in target:
            file, _, heading = target.partition("#")
            yield file, heading


def anchors(text: str) -> set[str]:
    """What a link to a heading of the document may say after its #, as GitHub makes it."""
    titles = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_every_example_of_extending_is_in_the_file_that_it_names():
    found = EXAMPLE.findall(EXTENDING.read_text())
    assert len(found) == EXTENDING.read_text().count("```python"), "an example without the name of its file above it"
    for name, example in found:
        assert example in (ROOT / name).read_text(), f"{name} has no longer what docs/extending.md shows of it"


def test_every_file_of_the_extension_is_shown():
    shown = {name for name, _ in EXAMPLE.findall(EXTENDING.read_text())}
    plugin = ROOT / "tests/extension/plugin.py"
    imported = {
        node.module for node in ast.walk(ast.parse(plugin.read_text())) if isinstance(node, ast.ImportFrom) and node.module
    }
    own = {name for name in imported if name.startswith("tests.extension.")}
    assert {f"{name.replace('.', '/')}.py" for name in own} <= shown


@pytest.mark.parametrize("path", DOCUMENTS, ids=ids)
def test_links_lead_to_files_and_headings(path):
    for file, heading in links(path.read_text()):
        target = (path.parent / file).resolve() if file else path
        assert target.exists(), f"{ids(path)} links to {file}"
        if heading:
            assert heading in anchors(target.read_text()), f"{ids(path)} links to {file}#{heading}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=ids)
def test_paths_exist(path):
    """A path with a folder is below the project, the package or, for a test's file, what the document says of it."""
    for code in code_of(path.read_text()):
        for name in re.findall(rf"(?<![\w./*{{-])[\w.-]+(?:/[\w.-]+)*(?:/|{SUFFIXES}\b)(?![\w*{{./])", code):
            first, slash, _ = name.partition("/")
            ours = first in TOP or (ROOT / "megatron_gemini" / first).is_dir()
            if slash and ours and not (first == "data" and name.endswith("/")):
                exists = any((base / name).exists() for base in (ROOT, ROOT / "megatron_gemini"))
                assert exists, f"{ids(path)} speaks of {name}"


def test_the_map_of_the_code_is_complete():
    block = next(code for code in re.findall(r"(?:^    .*\n)+", (ROOT / "README.md").read_text(), re.M) if "registry.py" in code)
    package, found = "", set()
    for indent, name in re.findall(r"^    (  )?([\w./]+)  ", block.replace("megatron_gemini/\n", "megatron_gemini/  \n"), re.M):
        if not indent:
            package = name
        place = f"{package}{name}" if indent else name
        assert (ROOT / place).exists(), place
        found.add(place.rstrip("/"))
    folders = [each for each in (ROOT / "megatron_gemini").iterdir() if (each / "__init__.py").exists()]
    assert {ids(each) for each in folders} <= found


def setting_exists(name: str) -> bool:
    """Whether a dotted name leads to a setting or a section, with NAME and numbers for what the user chooses."""
    kind = Section(RunConfig)
    for part in name.split("."):
        if not names_below(kind) and below(kind, "x") is None:
            return False
        inner = below(kind, part)
        if inner is None and part == "NAME":
            inner = below(kind, "vision") or below(kind, "x")
        if inner is None:
            return False
        kind = inner
    return True


@pytest.mark.parametrize("path", DOCUMENTS, ids=ids)
def test_settings_exist(path):
    """Every --section.field, and every section.field in backquotes whose section is one of the configuration's."""
    sections = names_below(Section(RunConfig))
    for code in code_of(path.read_text()):
        named = re.findall(r"(?<!\S)--([a-z_]+(?:\.\w+)+)", code)
        whole = re.fullmatch(r"([a-z_]+(?:\.\w+)+)(?:: .*)?", code)
        if whole and not re.search(rf"{SUFFIXES}$", whole[1]) and "_" + whole[1].split(".")[-1] != "_py":
            named.append(whole[1])
        for name in named:
            if name.split(".")[0] in sections:
                assert setting_exists(name), f"{ids(path)} speaks of the setting {name}"
