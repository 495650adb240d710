# SPDX-License-Identifier: Apache-2.0
"""SVG of sensitivities by block and width, and of fronts of loss against cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

# Sequential scale, light to dark (ColorBrewer YlOrRd).
_COLOURS = ("#ffffcc", "#ffeda0", "#fed976", "#feb24c", "#fd8d3c", "#fc4e2a", "#e31a1c", "#b10026")
_LINES = ("#1f78b4", "#e31a1c", "#33a02c", "#ff7f00", "#6a3d9a", "#b15928")
_FONT = 'font-family="system-ui,sans-serif" font-size="11"'
_CELL, _ROW, _LEFT, _TOP = 64, 22, 150, 54

Cells = Mapping[str, Mapping[str, float]]


def heat_map(cells: Cells, *, title: str, is_logarithmic: bool = True) -> str:
    """A table of numbers as colours: rows by columns, darker is larger.

    Args:
        cells: value by row and column, in the order shown; missing ones stay blank.
        title: above the picture.
        is_logarithmic: colours by order of magnitude.
    """
    columns = list(dict.fromkeys(name for row in cells.values() for name in row))
    known = [v for row in cells.values() for v in row.values() if math.isfinite(v)]
    width, height = _LEFT + _CELL * len(columns) + 12, _TOP + _ROW * len(cells) + 12
    parts = [_begin(width, height, title)]
    for i, name in enumerate(columns):
        x = _LEFT + _CELL * (i + 0.5)
        parts.append(f'<text x="{x:.0f}" y="{_TOP - 8}" text-anchor="middle">{escape(name)}</text>')
    for j, (name, row) in enumerate(cells.items()):
        y = _TOP + _ROW * j
        parts.append(
            f'<text x="{_LEFT - 8}" y="{y + 15}" text-anchor="end">{escape(_short(name))}</text>'
        )
        for i, column in enumerate(columns):
            if column in row:
                parts.append(_cell(row[column], known, (_LEFT + _CELL * i, y), is_logarithmic))
    return "".join([*parts, "</svg>"])


def _begin(width: int, height: int, title: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'{_FONT} role="img"><rect width="{width}" height="{height}" fill="#fff"/>'
        f'<text x="8" y="18" font-weight="bold">{escape(title)}</text>'
    )


def _cell(value: float, known: Sequence[float], at: tuple[int, int], is_logarithmic: bool) -> str:
    share = _share(value, known, is_logarithmic)
    colour = _COLOURS[min(int(share * len(_COLOURS)), len(_COLOURS) - 1)]
    ink = "#fff" if share > 0.75 else "#222"
    x, y = at
    return (
        f'<rect x="{x}" y="{y}" width="{_CELL - 2}" height="{_ROW - 2}" fill="{colour}"/>'
        f'<text x="{x + _CELL / 2:.0f}" y="{y + 14}" text-anchor="middle" fill="{ink}">'
        f"{value:.3g}</text>"
    )


def _share(value: float, known: Sequence[float], is_logarithmic: bool) -> float:
    """Place of a value between the least and the largest, 0 to 1."""
    if not math.isfinite(value):
        return 1.0
    if not is_logarithmic:
        low, high = min(known), max(known)
        return (value - low) / (high - low) if high > low else 0.0
    positive = [v for v in known if v > 0]
    if value <= 0 or not positive or min(positive) == max(positive):
        return 0.0
    low, high = math.log(min(positive)), math.log(max(positive))
    return (math.log(value) - low) / (high - low)


def curves(
    lines: Mapping[str, Sequence[tuple[float, float]]], *, title: str, axes: tuple[str, str]
) -> str:
    """Points joined by lines, one colour per name.

    Args:
        lines: (x, y) by name, in the order of drawing.
        title: above the picture.
        axes: names of x and y.
    """
    points = [p for line in lines.values() for p in line]
    width, height, left, top, right, bottom = 560, 360, 66, 40, 150, 46
    xs, ys = [p[0] for p in points] or [0.0], [p[1] for p in points] or [0.0]
    reach = (max(xs) - min(xs) or 1.0, max(ys) - min(ys) or 1.0)

    def place(x: float, y: float) -> tuple[float, float]:
        across = left + (x - min(xs)) / reach[0] * (width - left - right)
        return across, height - bottom - (y - min(ys)) / reach[1] * (height - top - bottom)

    parts = [_begin(width, height, title)]
    for k in range(5):
        x, y = min(xs) + reach[0] * k / 4, min(ys) + reach[1] * k / 4
        across, down = place(x, y)
        parts.append(
            f'<text x="{across:.0f}" y="{height - bottom + 16}" text-anchor="middle">{x:.3g}</text>'
            f'<text x="{left - 8}" y="{down + 4:.0f}" text-anchor="end">{y:.3g}</text>'
            f'<path d="M{left} {down:.0f}H{width - right}" stroke="#ddd"/>'
        )
    parts.append(
        f'<text x="{(left + width - right) / 2:.0f}" y="{height - 8}" text-anchor="middle">'
        f'{escape(axes[0])}</text><text x="12" y="{top - 8}">{escape(axes[1])}</text>'
    )
    for k, (name, line) in enumerate(lines.items()):
        parts.append(_line([place(x, y) for x, y in line], _LINES[k % len(_LINES)]))
        y = top + 16 * k
        parts.append(
            f'<rect x="{width - right + 12}" y="{y}" width="10" height="10" '
            f'fill="{_LINES[k % len(_LINES)]}"/>'
            f'<text x="{width - right + 27}" y="{y + 9}">{escape(name)}</text>'
        )
    return "".join([*parts, "</svg>"])


def _line(spots: Sequence[tuple[float, float]], colour: str) -> str:
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in spots)
    dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in spots)
    return f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>{dots}'


def _short(text: str, size: int = 22) -> str:
    return text if len(text) <= size else f"…{text[1 - size :]}"
