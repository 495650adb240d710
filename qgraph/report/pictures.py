# SPDX-License-Identifier: Apache-2.0
"""Inline SVG of the report: the graph, bars of errors, bars of shares."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape

from qgraph.report.graph_view import GraphNode
from qgraph.report.style import bits_colour, error_colour

_GLYPHS = {
    "linear": "L", "conv": "C", "conv_transpose": "T", "matmul": "M", "add": "+", "mul": "×",
    "cat": "∥", "softmax": "S", "norm": "N", "elementwise": "ƒ", "max_pool": "P", "pool": "P",
    "resize": "R", "embedding": "E", "other": "·",
}  # fmt: skip
GLYPH_NAMES = (
    ("L", "linear"), ("C", "convolution"), ("T", "transposed convolution"), ("M", "matmul"),
    ("S", "softmax"), ("N", "norm"), ("ƒ", "elementwise"), ("E", "embedding"), ("P", "pool"),
    ("R", "resize"), ("∥", "concat"),
)  # fmt: skip
_STEP, _LANE, _SIZE, _BAND, _MARGIN = 40, 38, 24, 29, 22


def graph_picture(nodes: Sequence[GraphNode]) -> str:
    """Ops in columns by depth, wrapped into bands; edges that leave a band end at its border."""
    columns = _columns(nodes)
    lanes = _lanes(nodes, columns)
    bands: list[list[int]] = [[] for _ in range(max(columns, default=0) // _BAND + 1)]
    for i, column in enumerate(columns):
        bands[column // _BAND].append(i)
    heights = [(max((lanes[i] for i in band), default=0) + 1) * _LANE + 26 for band in bands]
    tops = [sum(heights[:k]) for k in range(len(heights))]
    spots = [
        (
            _MARGIN + (c % _BAND) * _STEP + _SIZE / 2,
            tops[c // _BAND] + 14 + lanes[i] * _LANE + _SIZE / 2,
        )
        for i, c in enumerate(columns)
    ]
    width = 2 * _MARGIN + min(max(columns, default=0) + 1, _BAND) * _STEP
    parts = [f'<svg viewBox="0 0 {width} {sum(heights)}" width="{width}" role="img">']
    parts.append("<title>The quantized graph</title>")
    for i, node in enumerate(nodes):
        parts.extend(_edge(spots, columns, j, i, width) for j in node.inputs)
    parts.extend(_glyph(node, *spots[i]) for i, node in enumerate(nodes))
    return "".join([*parts, "</svg>"])


def _columns(nodes: Sequence[GraphNode]) -> list[int]:
    depth: list[int] = []
    for node in nodes:
        depth.append(1 + max((depth[j] for j in node.inputs if j < len(depth)), default=-1))
    return depth


def _lanes(nodes: Sequence[GraphNode], columns: Sequence[int]) -> list[int]:
    """A row for each node: that of its first input where it is free, else the next free one."""
    taken: set[tuple[int, int]] = set()
    lanes: list[int] = []
    for i, node in enumerate(nodes):
        wanted = min((lanes[j] for j in node.inputs if j < i), default=0)
        while (columns[i], wanted) in taken:
            wanted += 1
        taken.add((columns[i], wanted))
        lanes.append(wanted)
    return lanes


def _edge(
    spots: Sequence[tuple[float, float]], columns: Sequence[int], start: int, end: int, width: int
) -> str:  # fmt: skip
    (x0, y0), (x1, y1) = spots[start], spots[end]
    x0, x1 = x0 + _SIZE / 2, x1 - _SIZE / 2
    if columns[start] // _BAND != columns[end] // _BAND:  # out at the right, in at the left
        up, down = y0 - 18, y1 - 18
        out = _path((x0, y0), f"Q{(x0 + width) / 2:.0f} {up:.0f} {width - 4} {up:.0f}")
        return out + _path((4, down), f"Q{x1 / 2:.0f} {down:.0f} {x1:.0f} {y1:.0f}")
    if y0 == y1 and columns[end] - columns[start] > 1:  # over the nodes between
        top = y0 - _SIZE / 2 - 7
        return _path((x0, y0), f"C{x0 + 9:.0f} {top:.0f} {x1 - 9:.0f} {top:.0f} {x1:.0f} {y1:.0f}")
    bend = max(8.0, (x1 - x0) / 2)
    curve = f"C{x0 + bend:.0f} {y0:.0f} {x1 - bend:.0f} {y1:.0f} {x1:.0f} {y1:.0f}"
    return _path((x0, y0), curve)


def _path(start: tuple[float, float], rest: str) -> str:
    return f'<path class="edge" d="M{start[0]:.0f} {start[1]:.0f}{rest}"/>'


def _glyph(node: GraphNode, x: float, y: float) -> str:
    bits = (
        "float" if node.bits >= 32 else f"{node.weight_bits or '–'}·{node.activation_bits or '–'}"
    )
    error = "" if math.isnan(node.sqnr) else f", {node.sqnr:.1f} dB"
    place = node.path or "the model"
    hint = f"{node.name} ({node.op}) in {place}: weight·activation bits {bits}{error}"
    style = f"--e:{error_colour(node.sqnr)};--b:{bits_colour(node.bits)}"
    kind = "op float" if node.bits >= 32 else "op"
    half = _SIZE / 2
    return (
        f'<g class="node"><title>{escape(hint)}</title><rect class="{kind}" style="{style}" '
        f'x="{x - half:.0f}" y="{y - half:.0f}" width="{_SIZE}" height="{_SIZE}" rx="6"/>'
        f'<text x="{x:.0f}" y="{y + 4:.0f}">{_GLYPHS.get(node.op, "·")}</text></g>'
        f'<text class="label soft" x="{x:.0f}" y="{y + half + 9:.0f}">'
        f"{bits if node.bits < 32 else ''}</text>"
    )


def error_bars(rows: Iterable[tuple[str, str, float]]) -> str:
    """Bars of dB: (name, note, value) each, in the order given; the scale ends at 60 dB."""
    shown = list(rows)
    height, label, full = 19, 205, 240
    parts = [f'<svg viewBox="0 0 530 {height * len(shown) + 4}" width="620" role="img">']
    for k, (name, note, value) in enumerate(shown):
        y = k * height
        size = full * min(max(value, 0.0), 60.0) / 60 if not math.isnan(value) else 0.0
        text = "exact" if value == math.inf else f"{value:.1f}"
        parts.append(
            f"<g><title>{escape(note)}</title>"
            f'<text x="{label - 8}" y="{y + 13}" text-anchor="end">'
            f"{escape(_short(name, 29))}</text>"
            f'<rect class="track" x="{label}" y="{y + 4}" width="{full}" height="11" rx="3"/>'
            f'<rect x="{label}" y="{y + 4}" width="{max(size, 2):.1f}" height="11" rx="3" '
            f'fill="{error_colour(value)}"/>'
            f'<text class="soft" x="{label + full + 7}" y="{y + 13}">{text}</text></g>'
        )
    return "".join([*parts, "</svg>"])


def share_bar(parts: Sequence[tuple[str, float, str]]) -> str:
    """One bar split into (label, amount, colour), widest labels inside."""
    total = sum(amount for _, amount, _ in parts) or 1.0
    x, pieces = 0.0, []
    for label, amount, colour in parts:
        size = 1000 * amount / total
        share = f"{100 * amount / total:.1f} %"
        pieces.append(
            f'<g class="node"><title>{escape(label)}: {share}</title><rect x="{x:.1f}" y="0" '
            f'width="{max(size - 1.5, 0.5):.1f}" height="26" rx="4" fill="{colour}"/>'
        )
        if size > 7.5 * (len(label) + len(share) + 3):
            pieces.append(f'<text x="{x + size / 2:.1f}" y="17">{escape(label)} · {share}</text>')
        pieces.append("</g>")
        x += size
    return f'<svg viewBox="0 0 1000 26" width="100%" role="img">{"".join(pieces)}</svg>'


def time_bar(seconds: float, longest: float) -> str:
    """A small bar beside a number of seconds."""
    size = 160 * seconds / longest if longest > 0 else 0
    return (
        '<svg viewBox="0 0 160 10" width="160"><rect class="track" width="160" height="10" rx="3"/>'
        f'<rect width="{max(size, 1):.1f}" height="10" rx="3" fill="#74add1"/></svg>'
    )


def _short(text: str, size: int) -> str:
    return text if len(text) <= size else f"…{text[1 - size :]}"
