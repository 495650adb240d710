# SPDX-License-Identifier: Apache-2.0
"""Real English sentences: docstrings of packages that qgraph is installed with.

Calibration and evaluation read different packages, so no sentence is in both.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import random
import re
from collections.abc import Iterator
from pathlib import Path

SOURCES = {"calibration": "networkx", "development": "numpy", "evaluation": "scipy"}
POOL = 2048  # sentences read before shuffling; more only where more are asked for
_PLAIN = re.compile(r"[A-Za-z][A-Za-z0-9 ,.'()\-]*")


def sentences(split: str, count: int, *, seed: int = 0) -> list[str]:
    """`count` distinct sentences of a split, in an order fixed by the seed.

    Args:
        split: ``calibration``, ``development`` or ``evaluation``.
        count: how many; ValueError if the package has fewer.
        seed: of the shuffle.
    """
    found = list(_sentences(SOURCES[split], max(count, POOL)))
    if count > len(found):
        msg = f"{SOURCES[split]} has {len(found)} sentences, {count} were asked for"
        raise ValueError(msg)
    random.Random(seed).shuffle(found)
    return found[:count]


@functools.cache
def _sentences(package: str, enough: int) -> tuple[str, ...]:
    """Distinct sentences from the package's files, read in a fixed random order until enough."""
    spec = importlib.util.find_spec(package)
    assert spec is not None, f"{package} is not installed"
    assert spec.submodule_search_locations is not None
    root = Path(next(iter(spec.submodule_search_locations)))
    files = [p for p in sorted(root.rglob("*.py")) if "tests" not in p.parts]
    random.Random(0).shuffle(files)
    unique: dict[str, None] = {}
    for path in files:
        if len(unique) >= enough:
            break
        for text in _docstrings(path):
            unique.update(dict.fromkeys(_split(text)))
    return tuple(unique)


def _docstrings(path: Path) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text:
                yield text


def _split(text: str) -> Iterator[str]:
    for part in re.split(r"(?<=[.])\s+", " ".join(text.split())):
        if 40 < len(part) < 300 and _PLAIN.fullmatch(part):
            yield part
