# SPDX-License-Identifier: Apache-2.0
"""Bits against sensitivity: what each layer would cost at each width, and what was chosen."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from typing import Any

from qgraph.report.plain import number, plain
from qgraph.report.style import bits_colour


@dataclass(frozen=True, slots=True)
class SensitivityPoint:
    """One layer at one width.

    Attributes:
        name: of the layer.
        bits: of the width tried.
        cost: what it costs at that width, in any unit; larger is worse.
        chosen: whether it was chosen.
    """

    name: str
    bits: int
    cost: float
    chosen: bool = False

    def to_dict(self) -> dict[str, object]:
        """As JSON values."""
        data = plain(asdict(self))
        assert isinstance(data, dict)
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SensitivityPoint:
        """Read what `to_dict` gave.

        Raises:
            KeyError, TypeError, ValueError: the data is something else.
        """
        return cls(str(data["name"]), int(data["bits"]), number(data["cost"]), bool(data["chosen"]))


def sensitivity_picture(points: Sequence[SensitivityPoint]) -> str:
    """One line per layer over the widths, on a logarithmic scale; the chosen widths are dots."""
    usable = [p for p in points if p.cost > 0 and math.isfinite(p.cost)]
    if not usable:
        return ""
    widths = sorted({p.bits for p in usable})
    low, high = (f(math.log10(p.cost) for p in usable) for f in (min, max))
    span = max(high - low, 1e-9)
    wide, tall, left = 820, 260, 60

    def place(point: SensitivityPoint) -> tuple[float, float]:
        x = left + (wide - left - 20) * widths.index(point.bits) / max(len(widths) - 1, 1)
        return x, 12 + (tall - 40) * (high - math.log10(point.cost)) / span

    lines: dict[str, list[SensitivityPoint]] = {}
    for point in usable:
        lines.setdefault(point.name, []).append(point)
    parts = [f'<svg viewBox="0 0 {wide} {tall}" width="100%" role="img">']
    for name, found in lines.items():
        spots = [place(p) for p in sorted(found, key=lambda p: p.bits)]
        path = "L".join(f"{x:.0f} {y:.0f}" for x, y in spots)
        parts.append(f'<g><title>{escape(name)}</title><path class="edge" d="M{path}"/></g>')
    for point in (p for p in usable if p.chosen):
        x, y = place(point)
        hint = f"{point.name}: {point.bits} bits, {point.cost:.3g}"
        parts.append(
            f'<circle cx="{x:.0f}" cy="{y:.0f}" r="4" fill="{bits_colour(point.bits)}">'
            f"<title>{escape(hint)}</title></circle>"
        )
    parts += _axes(widths, left, wide, tall, (low, high))
    return "".join([*parts, "</svg>"])


def _axes(
    widths: Sequence[int], left: int, wide: int, tall: int, ends: tuple[float, float]
) -> Iterable[str]:
    for at, bits in enumerate(widths):
        x = left + (wide - left - 20) * at / max(len(widths) - 1, 1)
        yield _label(x, tall - 6, "middle", f"{bits} bits")
    for exponent, y in ((ends[1], 16), (ends[0], tall - 26)):
        yield _label(left - 12, y, "end", f"{10**exponent:.1e}")


def _label(x: float, y: float, anchor: str, text: str) -> str:
    return f'<text class="soft" x="{x:.0f}" y="{y}" text-anchor="{anchor}">{text}</text>'
