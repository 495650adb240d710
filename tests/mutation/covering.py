# SPDX-License-Identifier: Apache-2.0
"""Which tests run a line, from a coverage file that `make coverage` wrote.

A bug is only shown to tests that reach it, so a verdict takes seconds; a survivor stands on a line
that tests run and do not check.
"""

from __future__ import annotations

import ast
import hashlib
from pathlib import Path

from coverage import CoverageData

MOST = 60


class Covering:
    """The map from lines to tests.

    Attributes:
        data: with one context per test, as ``pytest --cov-context=test`` keeps them.
    """

    def __init__(self, path: Path) -> None:
        self.data = CoverageData(str(path))
        self.data.read()
        self._files = {self._key(name): name for name in self.data.measured_files()}

    @staticmethod
    def _key(name: str) -> str:
        """The path inside the repository; the measuring one may have stood elsewhere."""
        for room in ("qgraph/formats/", "qgraph/graph/", "passes/", "backends/"):
            if f"/{room}" in name:
                return room + name.rpartition(f"/{room}")[2]
        return name

    def tests(self, file: str, text: str, line: int) -> tuple[str, ...]:
        """Tests that run the statement of a line, at most `MOST`.

        Those of its own file first, then one of each file, those of its room before others.
        """
        if file not in self._files:
            return ()
        contexts = self.data.contexts_by_lineno(self._files[file])
        found = {
            name.rpartition("|")[0] for at in _lines_of_statement(text, line)
            for name in contexts.get(at, ()) if name
        }  # fmt: skip
        stem, room = Path(file).stem, "backends" if "backends" in file else Path(file).parent.name
        by_file: dict[Path, list[str]] = {}
        for test in sorted(found, key=lambda name: hashlib.sha256(name.encode()).hexdigest()):
            by_file.setdefault(Path(test.partition("::")[0]), []).append(test)
        ranked = [
            (path.stem != f"test_{stem}", turn, path.parent.name != room, test)
            for path, tests in by_file.items() for turn, test in enumerate(tests)
        ]  # fmt: skip
        return tuple(test for *_, test in sorted(ranked))[:MOST]


def _lines_of_statement(text: str, line: int) -> range:
    """The lines of the innermost statement, without those of statements inside it."""
    inner: ast.stmt | None = None
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.stmt) and node.lineno <= line <= (node.end_lineno or 0):
            inner = node
    if inner is None:
        return range(line, line + 1)
    body = getattr(inner, "body", None)
    end = body[0].lineno - 1 if body else inner.end_lineno
    return range(inner.lineno, max(end or 0, line, inner.lineno) + 1)
