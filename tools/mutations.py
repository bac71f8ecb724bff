"""Small changes of a Python file, each of which some test should notice.

Left alone: annotations, docstrings, assertions (a programmer's, which no input reaches), imports, strings.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar, cast

Node = TypeVar("Node", bound=ast.AST)
COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
UNTOUCHED = (ast.Assert, ast.Import, ast.ImportFrom, ast.JoinedStr)
"""Nodes below which nothing is changed. Python 3.11 gives wrong places inside an f-string."""


@dataclass(frozen=True)
class Mutation:
    """One change of a file. line: from 1. begin, end: bytes of the source that `new` takes the place of."""

    line: int
    kind: str
    begin: int
    end: int
    old: str
    new: str

    @property
    def change(self) -> str:
        """What it does, in a line."""
        return " ".join(f"{self.old} -> {self.new}".split())

    def apply(self, source: str) -> str:
        data = source.encode()
        return (data[: self.begin] + self.new.encode() + data[self.end :]).decode()


def mutations_of(source: str) -> list[Mutation]:
    """Every change of `source` that is known here, in the order of its lines; all of them can be parsed."""
    starts = [0]
    for line in source.encode().splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    found = []
    tree = ast.parse(source)
    tests = {id(node.test) for node in ast.walk(tree) if isinstance(node, (ast.If, ast.While))}
    for node in _changeable(tree):
        changes = list(_changed(node))
        if id(node) in tests and not isinstance(node, (ast.Compare, ast.Constant)):  # those have a change of their own
            changes.append(("boolean", ast.UnaryOp(ast.Not(), cast("ast.expr", node))))
        for kind, new in changes:
            assert isinstance(node, (ast.expr, ast.stmt, ast.Slice)) and node.end_lineno is not None
            begin = starts[node.lineno - 1] + node.col_offset
            end = starts[node.end_lineno - 1] + (node.end_col_offset or 0)
            text = _with_brackets(new, node)
            found.append(Mutation(node.lineno, kind, begin, end, source.encode()[begin:end].decode(), text))
    return sorted(found, key=lambda each: (each.begin, each.end, each.kind, each.new))


def _with_brackets(new: ast.AST, node: ast.AST) -> str:
    text = ast.unparse(new)
    # Brackets keep the old order of evaluation, and let a call go on over lines. A slice must not have any.
    return text if isinstance(node, (ast.stmt, ast.Slice, ast.Constant)) else f"({text})"


def _changeable(node: ast.AST) -> Iterator[ast.AST]:
    """`node` and what is below it, without annotations, docstrings and what is never run."""
    if isinstance(node, UNTOUCHED) or (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
        return
    yield node
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from _changeable(child)


def _changed(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """(kind of change, the node after it)."""
    for change in (_operators, _constants, _conditions, _calls, _statements, _slices):
        yield from change(node)


def _but(node: Node, change: Callable[[Node], None]) -> Node:
    """A copy, changed."""
    other = copy.deepcopy(node)
    change(other)
    return other


def _operators(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    if isinstance(node, ast.Compare):
        for place, operator in enumerate(node.ops):
            other = COMPARISONS[type(operator)]()
            yield "comparison", _but(node, lambda n, at=place, to=other: n.ops.__setitem__(at, to))  # type: ignore[misc]
    if isinstance(node, (ast.BinOp, ast.AugAssign)) and type(node.op) in ARITHMETIC:
        yield "arithmetic", _but(node, lambda n: setattr(n, "op", ARITHMETIC[type(n.op)]()))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.Invert)):
        yield "arithmetic", node.operand


def _constants(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    if isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield "boolean", ast.Constant(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        for step in (1, -1):
            yield "constant", ast.Constant(node.value + step)


def _conditions(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    if isinstance(node, ast.BoolOp):
        yield "boolean", ast.BoolOp(ast.Or() if isinstance(node.op, ast.And) else ast.And(), node.values)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield "boolean", node.operand
    if isinstance(node, ast.IfExp):
        yield "boolean", ast.IfExp(ast.UnaryOp(ast.Not(), node.test), node.body, node.orelse)


def _calls(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    if not isinstance(node, ast.Call):
        return
    for place, keyword in enumerate(node.keywords):
        if keyword.arg is not None:
            yield "keyword", _but(node, lambda n, at=place: n.keywords.pop(at))  # type: ignore[misc]
    for place in range(len(node.args) - 1):
        pair = node.args[place : place + 2]
        if not any(isinstance(each, ast.Starred) for each in pair) and ast.dump(pair[0]) != ast.dump(pair[1]):
            swapped = [*node.args[:place], *reversed(pair), *node.args[place + 2 :]]
            yield "swap", ast.Call(node.func, swapped, node.keywords)


def _statements(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    dropped = isinstance(node, (ast.AugAssign, ast.Raise, ast.Break, ast.Continue, ast.Delete))
    dropped |= isinstance(node, ast.Expr) and not isinstance(node.value, ast.Constant)
    # A name that is not assigned is an error at its first use; an attribute or an element may go unnoticed.
    dropped |= isinstance(node, ast.Assign) and not any(isinstance(target, ast.Name) for target in node.targets)
    if dropped:
        yield "statement", ast.Pass()


def _slices(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    if isinstance(node, ast.Slice):
        for name in ("lower", "upper"):
            if getattr(node, name) is not None:
                yield "slice", _but(node, lambda n, of=name: setattr(n, of, None))  # type: ignore[misc]
