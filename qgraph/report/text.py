# SPDX-License-Identifier: Apache-2.0
"""Plain-text tables that fit a terminal."""

from __future__ import annotations

from collections.abc import Sequence


def table(head: Sequence[str], rows: Sequence[Sequence[object]], *, width: int = 100) -> str:
    """A table of left-aligned columns, at most `width` characters wide; long cells are cut.

    >>> print(table(("a", "b"), [(1, "x")]))
    a  b
    1  x
    """
    cells = [[str(item) for item in row] for row in (head, *rows)]
    sizes = [max(len(row[i]) for row in cells) for i in range(len(head))]
    while sum(sizes) + 2 * (len(sizes) - 1) > width:
        sizes[sizes.index(max(sizes))] -= 1
    lines = [
        "  ".join(_fit(cell, size) for cell, size in zip(row, sizes, strict=True)).rstrip()
        for row in cells
    ]
    return "\n".join(lines)


def _fit(cell: str, size: int) -> str:
    return cell.ljust(size) if len(cell) <= size else f"{cell[: max(0, size - 1)]}…"
