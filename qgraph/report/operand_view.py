# SPDX-License-Identifier: Apache-2.0
"""Histograms of operands as inline SVG: float values as a hill, quantized ones as bars, levels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from qgraph.report.style import error_colour

if TYPE_CHECKING:
    from qgraph.report.distributions import Distribution
    from qgraph.report.layers import LayerRecord

_WIDTH, _HEIGHT = 288, 70
MAX_CARDS = 240


def operand_cards(layers: Sequence[LayerRecord]) -> tuple[str, int]:
    """Cards of the operands with a distribution, and how many were left out.

    Where there are too many, those whose op strays furthest are shown, in graph order.
    """
    known = [layer for layer in layers if layer.distribution is not None]
    ranked = sorted(known, key=lambda layer: math.inf if math.isnan(layer.sqnr) else layer.sqnr)
    kept = {id(layer) for layer in ranked[:MAX_CARDS]}
    cards = [_card(layer) for layer in known if id(layer) in kept]
    return f'<div class="cards">{"".join(cards)}</div>' if cards else "", len(known) - len(cards)


def _card(layer: LayerRecord) -> str:
    shape = layer.distribution
    assert shape is not None
    name = layer.path or layer.node
    unit = " scales" if shape.in_scales else ""
    facts = f"{_num(shape.low)} … {_num(shape.high)}{unit}"
    if shape.clipped:
        facts += f" · {100 * shape.clipped:.2g} % clipped"
    db = "" if math.isnan(layer.sqnr) else f"{layer.sqnr:.1f} dB"
    return (
        f'<figure title="{escape(layer.node)}"><figcaption><b>{escape(_tail(name))}</b>'
        f'<i style="background:{error_colour(layer.sqnr)}"></i><span>{db}</span></figcaption>'
        f"<small>{escape(layer.op)} {escape(layer.role)} · {escape(layer.format)}</small>"
        f"{histogram(shape)}<small>{facts} · {shape.num_levels} levels</small></figure>"
    )


def histogram(shape: Distribution) -> str:
    """Square roots of counts, so that tails can be seen."""
    most = math.sqrt(max(max(shape.before, default=1), 1))
    top = math.sqrt(max(max(shape.after, default=1), 1))
    step = _WIDTH / len(shape.before)
    hill = [f"M0 {_HEIGHT}"]
    for i, count in enumerate(shape.before):
        hill.append(
            f"L{(i + 0.5) * step:.0f} {_HEIGHT - 0.94 * _HEIGHT * math.sqrt(count) / most:.0f}"
        )
    hill.append(f"L{_WIDTH} {_HEIGHT}Z")
    bars = "".join(
        f"M{(i + 0.5) * step:.0f} {_HEIGHT}v-{0.94 * _HEIGHT * math.sqrt(count) / top:.0f}"
        for i, count in enumerate(shape.after)
        if count
    )
    span = shape.last - shape.first
    ticks = "".join(
        f"M{(level - shape.first) / span * _WIDTH:.1f} {_HEIGHT}v6"
        for level in shape.levels
        if shape.first <= level <= shape.last
    )
    zero = -shape.first / span * _WIDTH
    mark = f'<path class="zero" d="M{zero:.0f} 0V{_HEIGHT}"/>' if 0 <= zero <= _WIDTH else ""
    line = f'<path class="base" d="M0 {_HEIGHT}h{_WIDTH}"/>'
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT + 8}" width="100%" role="img">{mark}'
        f'<path class="hill" d="{"".join(hill)}"/><path class="bars" d="{bars}"/>{line}'
        f'<path class="ticks" d="{ticks}"/></svg>'
    )


def _num(value: float) -> str:
    return f"{value:.3g}"


def _tail(name: str) -> str:
    return name if len(name) <= 34 else f"…{name[-33:]}"
