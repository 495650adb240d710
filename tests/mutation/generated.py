# SPDX-License-Identifier: Apache-2.0
"""Bugs by rule: other comparisons, numbers off by one, lost `not`, min for max, plus for minus, or
for and. A seeded sample of all places in formats, graph, passes and backends.
"""

from __future__ import annotations

import ast
import functools
import itertools
import random
from pathlib import Path
from typing import NamedTuple

from tests.mutation.planting import ROOT, Change

ROOMS = ("qgraph/formats", "qgraph/graph", "passes", "backends")
COMPARISONS: dict[type[ast.cmpop], tuple[str, str]] = {
    ast.Lt: ("<", "<="), ast.LtE: ("<=", "<"), ast.Gt: (">", ">="), ast.GtE: (">=", ">"),
    ast.Eq: ("==", "!="), ast.NotEq: ("!=", "=="), ast.In: ("in", "not in"),
    ast.NotIn: ("not in", "in"), ast.Is: ("is", "is not"), ast.IsNot: ("is not", "is"),
}  # fmt: skip
PAIRS = (
    ("min", "max"), ("amin", "amax"), ("minimum", "maximum"), ("clamp_min", "clamp_max"),
    ("floor", "ceil"), ("any", "all"),
)  # fmt: skip
NAMES = {a: b for pair in PAIRS for a, b in (pair, pair[::-1])}
MOST_TESTS = 8  # files of tests that a generated bug is shown to


class Generated(NamedTuple):
    """One generated bug.

    Attributes:
        change: where and what.
        rule: which rule made it.
        line: number of its line.
        old, new: that line before and after.
        tests: files of tests, most likely ones first; a coverage file tells more.
    """

    change: Change
    rule: str
    line: int
    old: str
    new: str
    tests: tuple[str, ...]


class _Places(ast.NodeVisitor):
    """Collects (start, end, new text, rule) of one file."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.found: list[tuple[int, int, str, str]] = []
        raw = text.encode()
        self.lines = [0]
        self.lines += [i + 1 for i, byte in enumerate(raw) if byte == 10]
        self.raw = raw

    def at(self, line: int, column: int) -> int:
        """Offset in characters; the parser counts bytes."""
        return len(self.raw[: self.lines[line - 1] + column].decode())

    def span(self, node: ast.expr) -> tuple[int, int]:
        """First and last offset of an expression."""
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        start = self.at(node.lineno, node.col_offset)
        return start, self.at(node.end_lineno, node.end_col_offset)

    def between(self, left: ast.expr, right: ast.expr, old: str, new: str, rule: str) -> None:
        """Replace an operator that stands between two operands."""
        start, end = self.span(left)[1], self.span(right)[0]
        at = self.text.find(old, start, end)
        if at >= 0:
            self.found.append((at, at + len(old), new, rule))

    def visit_Compare(self, node: ast.Compare) -> None:
        operands = [node.left, *node.comparators]
        for left, operator, right in zip(operands, node.ops, operands[1:], strict=False):
            self.between(left, right, *COMPARISONS[type(operator)], "comparison")
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        if isinstance(node.op, (ast.Add, ast.Sub)):
            old, new = ("+", "-") if isinstance(node.op, ast.Add) else ("-", "+")
            self.between(node.left, node.right, old, new, "sign")
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        old, new = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
        self.between(node.values[0], node.values[1], old, new, "junction")
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        start, end = self.span(node)
        inner = self.span(node.operand)
        if isinstance(node.op, ast.Not):
            self.found.append((start, inner[0], "", "negation"))
        if isinstance(node.op, ast.USub) and isinstance(node.operand, ast.Constant):
            if node.operand.value == 1:
                self.found.append((start, end, "0", "axis"))
            return
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        if type(node.value) is int:
            self.found.append((*self.span(node), str(node.value + 1), "number"))

    def visit_Call(self, node: ast.Call) -> None:
        function = node.func
        name = function.id if isinstance(function, ast.Name) else getattr(function, "attr", "")
        if name in NAMES:
            end = self.span(function)[1]
            self.found.append((end - len(name), end, NAMES[name], "extremum"))
        self.generic_visit(node)

    def visit_Raise(self, node: ast.Raise) -> None:
        """What errors say is tested by their words."""

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        """Positions in f-strings are those of the string."""

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        for default in [*node.args.defaults, *filter(None, node.args.kw_defaults)]:
            self.visit(default)
        for statement in node.body:
            self.visit(statement)

    def visit_Expr(self, node: ast.Expr) -> None:
        if not isinstance(node.value, ast.Constant):  # docstrings
            self.generic_visit(node)


def module_name(file: str) -> str:
    """As it is imported."""
    name = file.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
    return name if name.startswith("qgraph") else f"qgraph.{name}"


@functools.cache
def _sources_of_tests() -> dict[str, str]:
    paths = sorted((ROOT / "tests").rglob("test_*.py"))
    skipped = {"mutation", "validation", "examples", "faults", "hostile"}
    return {
        str(p.relative_to(ROOT)): p.read_text() for p in paths
        if not skipped & set(p.relative_to(ROOT).parts)
    }  # fmt: skip


@functools.cache
def tests_of(file: str) -> tuple[str, ...]:
    """Tests named like the file, then those that import it, then those of the whole room."""
    stem, name = Path(file).stem, module_name(file)
    room = "backends" if file.startswith("backends") else Path(file).parent.name
    named, importing, near = [], [], []
    for path, text in _sources_of_tests().items():
        if f"{Path(path).stem}_".startswith(f"test_{stem}_"):
            named.append(path)
        elif f"from {name} import" in text or f"import {name}\n" in text:
            importing.append(path)
        elif Path(path).parent.name == room and stem in text:
            near.append(path)
    importing.sort(key=lambda path: Path(path).parent.name != room)
    chosen = [*named, *importing, *near]
    if not named and len(chosen) < MOST_TESTS:
        chosen.append("tests/test_compile.py")
    return tuple(dict.fromkeys(chosen))[:MOST_TESTS]


Place = tuple[str, int, int, str, str]  # file, start, end, new text, rule


def places_of(file: str) -> list[Place]:
    """Where the rules apply in a file."""
    text = (ROOT / file).read_text()
    places = _Places(text)
    places.visit(ast.parse(text))
    return [(file, *found) for found in places.found]


def planted(place: Place) -> Generated | None:
    """The bug at a place; None where what comes out is no Python."""
    file, start, end, new, rule = place
    text = (ROOT / file).read_text()
    changed = text[:start] + new + text[end:]
    try:
        ast.parse(changed)
    except SyntaxError:
        return None
    line = text.count("\n", 0, start)
    old_line, new_line = (t.split("\n")[line].strip() for t in (text, changed))
    change = Change(file, start, end, new)
    return Generated(change, rule, line + 1, old_line, new_line, tests_of(file))


def all_places() -> list[Place]:
    """In the four rooms, in order."""
    files = [p for room in ROOMS for p in sorted((ROOT / room).rglob("*.py"))]
    return [place for path in files for place in places_of(str(path.relative_to(ROOT)))]


def sample(count: int, seed: int) -> list[Generated]:
    """A seeded sample; a larger one begins with the smaller."""
    found = all_places()
    random.Random(seed).shuffle(found)
    bugs = (bug for place in found if (bug := planted(place)) is not None)
    return list(itertools.islice(bugs, count))
