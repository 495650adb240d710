# SPDX-License-Identifier: Apache-2.0
"""The house rules that a machine can hold: import direction, sizes, the list of packages."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Lower layers never import higher ones.
LAYERS = {
    "qgraph.errors": 0,
    "qgraph.atomic": 1,
    "qgraph.garbage": 1,
    "qgraph.formats": 1,
    "qgraph.graph": 2,
    "qgraph.calibration": 3,
    "qgraph.context": 4,
    "qgraph.pipeline": 5,
    "qgraph.progress": 5,
    "qgraph.rewrite": 6,
    "qgraph.passes": 6,
    "qgraph.backends": 6,
    "qgraph.report": 6,
    "qgraph.plugins": 6,
    "qgraph.pipelines": 7,
    "qgraph.artifact": 7,
    "qgraph.model": 8,
    "qgraph.max_drop": 8,
    "qgraph.validation": 8,
    "qgraph.compiler": 9,
    "qgraph.bisect": 10,
    "qgraph.sensitivity": 10,
    "qgraph.testing": 10,
    "qgraph.cli": 11,
    "qgraph.__main__": 12,
    "qgraph": 10,
}


def sources():
    for folder in ("qgraph", "passes", "backends"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            relative = path.relative_to(ROOT)
            if relative.parts[:2] not in {("qgraph", "passes"), ("qgraph", "backends")}:
                yield path


def module_name(path: Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[0] != "qgraph":
        parts.insert(0, "qgraph")
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def layer(name: str) -> int:
    while name not in LAYERS:
        name = name.rpartition(".")[0]
    return LAYERS[name]


def imported(path: Path):
    """Imports that run, with the exception of those for type checkers only."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.ImportFrom) and node.module:
            if node.module == "qgraph":
                yield from (f"qgraph.{alias.name}" for alias in node.names)
            else:
                yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_imports_point_one_way():
    wrong = [
        f"{module_name(path)} imports {name}"
        for path in sources()
        for name in imported(path)
        if name.split(".")[0] == "qgraph" and layer(name) > layer(module_name(path))
    ]
    assert not wrong


def test_nothing_imports_what_stands_below_it_on_the_page():
    page = (ROOT / "docs/architecture.md").read_text()
    listed = re.findall(r"^    ((?:qgraph/|passes/|backends/)\S*)", page, re.MULTILINE)
    names = [room.removesuffix(".py").strip("/").replace("/", ".") for room in listed]
    rooms = [name if name.startswith("qgraph") else f"qgraph.{name}" for name in names]

    def place(name: str) -> int | None:
        above = (i for i, room in enumerate(rooms) if f"{name}.".startswith(f"{room}."))
        return next(above, None)

    for path in sources():
        own = place(module_name(path))
        assert own is not None or module_name(path) in {"qgraph", "qgraph.__main__"}
        assert not [n for n in imported(path) if own is not None and (place(n) or 0) > own], path


def test_passes_do_not_know_backends_and_backends_do_not_know_passes():
    for path in sources():
        room = module_name(path).split(".")[1:2]
        others = {"passes": "qgraph.backends", "backends": "qgraph.passes"}
        if room and room[0] in others:
            assert not [n for n in imported(path) if n.startswith(others[room[0]])], path


@pytest.mark.parametrize("path", list(sources()), ids=module_name)
def test_files_and_functions_stay_small(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            docstring = ast.get_docstring(node, clean=False) or ""
            length = (node.end_lineno or 0) - node.lineno - docstring.count("\n")
            assert length <= 60, f"{node.name} has {length} lines"


def test_every_package_of_the_tree_is_listed_for_the_build():
    listed = set(
        tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    )
    found = {module_name(p) for p in sources() if p.name == "__init__.py"}
    assert listed == found


def test_the_library_never_prints_and_every_file_has_its_licence_line():
    for path in sources():
        text = path.read_text()
        assert text.startswith("# SPDX-License-Identifier: Apache-2.0"), path
        calls = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Call)]
        printed = [c for c in calls if isinstance(c.func, ast.Name) and c.func.id == "print"]
        assert not printed or path.name == "cli.py", path
