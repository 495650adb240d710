# SPDX-License-Identifier: Apache-2.0
"""The report as one HTML page that needs nothing else: inline style, inline SVG, no scripts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING

from qgraph.report.operand_view import operand_cards
from qgraph.report.pictures import GLYPH_NAMES, error_bars, graph_picture, share_bar, time_bar
from qgraph.report.sensitivity import sensitivity_picture
from qgraph.report.style import (
    SHEET,
    bits_colour,
    bits_legend,
    error_colour,
    error_legend,
)

if TYPE_CHECKING:
    from qgraph.report.report import Report

MAX_ROWS = 1500
MAX_NODES = 2500
_OWNERS = ("linear", "conv", "conv_transpose", "embedding")


def page(report: Report) -> str:
    """The whole page."""
    name = report.name
    parts = [
        _tiles(report), _images(report), _graph(report), _errors(report), _operands(report),
        _sensitivity(report), _cost(report), _decisions(report), _layers(report), _steps(report),
        _parity(report), _notes(report),
    ]  # fmt: skip
    links = (
        ("images", "Images"), ("graph", "Graph"), ("errors", "Errors"), ("operands", "Operands"),
        ("sensitivity", "Sensitivity"), ("cost", "Cost"), ("decisions", "Decisions"),
        ("sites", "Sites"), ("steps", "Steps"), ("parity", "Parity"),
    )  # fmt: skip
    body = "".join(parts)
    nav = "".join(f'<a href="#{i}">{t}</a>' for i, t in links if f'id="{i}"' in body)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(name)} · qgraph report</title><style>{SHEET}</style></head><body><main>"
        f"<header><h1>Quantized with {escape(name)}</h1><p>Errors are measured on the sample that "
        f"was kept from calibration.</p></header><nav>{nav}</nav>{body}</main></body></html>\n"
    )


def _section(anchor: str, title: str, text: str, content: str) -> str:
    return (
        f'<section id="{anchor}"><h2>{escape(title)}</h2><p>{escape(text)}</p>{content}</section>'
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], numbers: Iterable[int] = ()) -> str:
    """Cells are HTML already; columns in `numbers` are right-aligned."""
    right = set(numbers)

    def line(cells: Sequence[str], tag: str) -> str:
        return "".join(
            f'<{tag} class="n">{c}</{tag}>' if i in right else f"<{tag}>{c}</{tag}>"
            for i, c in enumerate(cells)
        )

    body = "".join(f"<tr>{line(row, 'td')}</tr>" for row in rows)
    return (
        f'<div class="scroll"><table><thead><tr>{line(head, "th")}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _tiles(report: Report) -> str:
    tiles = [(f"{len(report.layers):,}", "quantized operands", _widths(report))]
    worst = report.worst()
    if worst is not None:
        tiles.append((f"{worst.sqnr:.1f} dB", "lowest SQNR of an op", worst.path or worst.node))
    if report.cost is not None:
        cost = report.cost
        tiles.append(
            (
                f"{cost.mean_weight_bits:.2f}",
                "bits per weight, mean",
                f"1/{cost.model_ratio:.2f} of the float size",
            )
        )
        tiles.append(
            (
                f"1/{cost.bit_operations_ratio:.1f}",
                "of the float bit operations",
                f"{cost.mean_bit_product:.1f} bits × bits per MAC",
            )
        )
    if report.parity is not None:
        parity = report.parity
        tiles.append(
            (
                f"{parity.mismatches:,}",
                "codes differ, integer ↔ reference",
                f"of {parity.codes:,} compared",
            )
        )
    seconds = sum(s.seconds for s in report.steps if not math.isnan(s.seconds))
    if seconds:
        tiles.append((f"{seconds:.1f} s", "spent in passes", f"{len(report.steps)} steps"))
    cells = "".join(
        f'<div class="tile"><b>{escape(a)}</b><span>{escape(b)}</span>'
        f"<small>{escape(c)}</small></div>"
        for a, b, c in tiles
    )
    return f'<div class="tiles">{cells}</div>'


def _widths(report: Report) -> str:
    counts: dict[int, int] = {}
    for layer in report.layers:
        counts[layer.bits] = counts.get(layer.bits, 0) + 1
    return ", ".join(f"{n} at {b} bits" for b, n in sorted(counts.items()))


def _legend(items: Iterable[tuple[str, str]], kind: str) -> str:
    cells = "".join(f'<span><i style="background:{c}"></i>{escape(t)}</span>' for c, t in items)
    return f'<div class="legend {kind}">{cells}</div>'


def _graph(report: Report) -> str:
    nodes = report.graph[:MAX_NODES]
    if not nodes:
        return ""
    used = {node.op for node in nodes}
    names = [f"<span><b>{g}</b> {n}</span>" for g, n in GLYPH_NAMES if _uses(used, n)]
    content = (
        '<input class="choice" type="radio" name="colour" id="by-error" checked>'
        '<input class="choice" type="radio" name="colour" id="by-bits">'
        '<div class="switch"><label for="by-error">colour by error</label>'
        '<label for="by-bits">colour by bits</label></div>'
        f'<div class="scroll">{graph_picture(nodes)}</div>'
        f"{_legend(((c, f'{t} dB' if t[0] in '<≥' else t) for c, t in error_legend()), 'of-error')}"
        f"{_legend(bits_legend({n.bits for n in nodes}), 'of-bits')}"
        f'<div class="legend">{"".join(names)}</div>'
    )
    text = (
        "Ops that compute, left to right, line by line. Below each: bits of its weight · bits of "
        "its input. Dashed: in float. Point at an op for its name and place."
    )
    if len(report.graph) > MAX_NODES:
        text += f" The first {MAX_NODES} of {len(report.graph)} are shown."
    return _section("graph", "Graph", text, content)


def _uses(used: set[str], name: str) -> bool:
    words = {"convolution": "conv", "transposed convolution": "conv_transpose", "concat": "cat"}
    return words.get(name, name) in used


def _errors(report: Report) -> str:
    seen: dict[str, tuple[str, str, float]] = {}
    for layer in report.layers:
        if not math.isnan(layer.sqnr):
            note = f"{layer.node} ({layer.op}) {layer.line}"
            owns = layer.role == "weight" or not layer.path  # else the module has several ops
            name = layer.path or layer.node
            shown = name if owns or layer.op in _OWNERS else f"{name} {layer.op}"
            seen.setdefault(layer.node, (shown, note, layer.sqnr))
    rows = list(seen.values())[:MAX_ROWS]
    if not rows:
        return ""
    half = (len(rows) + 1) // 2 if len(rows) > 8 else len(rows)
    halves = [rows[:half], rows[half:]] if half < len(rows) else [rows]
    content = (
        f'<div class="two">{"".join(f"<div>{error_bars(part)}</div>" for part in halves)}</div>'
    )
    text = "Signal to quantization noise of each op's output against the float model, in dB."
    return _section("errors", "Errors layer by layer", text, content)


def _images(report: Report) -> str:
    if not report.images:
        return ""

    def picture(data: str, text: str) -> str:
        return (
            f'<figure><img alt="{text}" src="data:image/png;base64,{data}">'
            f"<figcaption>{text}</figcaption></figure>"
        )

    rows = "".join(
        f'<div class="strip">{picture(i.picture, "input")}{picture(i.exact, "float mask")}'
        f"{picture(i.quantized, 'quantized mask')}"
        f"{picture(i.difference, f'{100 * (1 - i.agreement):.2f} % of pixels differ')}</div>"
        for i in report.images
    )
    text = "Masks of the float and of the quantized model on samples of the calibration data."
    return _section("images", "Sample images", text, rows)


def _operands(report: Report) -> str:
    cards, left_out = operand_cards(report.layers)
    if not cards:
        return ""
    text = (
        "Shaded: float values. Bars: quantized values. Ticks below: levels, where there are at "
        "most 64. Heights are square roots of counts; weights are in units of their channel's "
        "scale. Open for the histograms."
    )
    if left_out:
        text += f" The {left_out} with the smallest errors are left out."
    content = f"<details><summary>ranges and histograms</summary>{cards}</details>"
    return _section("operands", "Operands before and after", text, content)


def _sensitivity(report: Report) -> str:
    picture = sensitivity_picture(report.sensitivity)
    if not picture:
        return ""
    text = "What each layer costs at each width; dots are the widths that were chosen."
    return _section("sensitivity", "Bits against sensitivity", text, picture)


def _cost(report: Report) -> str:
    cost = report.cost
    if cost is None:
        return ""
    weights: dict[int, float] = {}
    work: dict[tuple[int, int], float] = {}
    for node in report.graph:
        if node.parameters:
            bits = node.weight_bits or 32
            weights[bits] = weights.get(bits, 0) + node.parameters
        if node.macs:
            pair = node.weight_bits or node.activation_bits or 32, node.activation_bits or 32
            work[pair] = work.get(pair, 0) + node.macs
    stored = [(_bits(b), n, bits_colour(b)) for b, n in sorted(weights.items())]
    multiplied = [
        (f"{_bits(w)} × {_bits(a)}", n, bits_colour(min(w, a)))
        for (w, a), n in sorted(work.items())
    ]
    bars = [("Weights, by width", stored), ("Multiply-accumulates, by widths", multiplied)]
    pictures = "".join(
        f'<p class="soft">{escape(t)}</p>{share_bar(parts)}<br>' for t, parts in bars if parts
    )
    rows = [
        ("weights", f"{cost.weight_bytes:,.0f} bytes", f"1/{cost.weight_ratio:.2f}"),
        ("scales and biases", f"{cost.scale_bytes + cost.bias_bytes:,.0f} bytes", ""),
        ("model: weights, scales, biases", "", f"1/{cost.model_ratio:.2f}"),
        (
            "activations, sum over stored tensors", f"{cost.activation_bytes:,.0f} bytes",
            f"1/{cost.activation_ratio:.2f}",
        ),
        ("activations, peak", f"{cost.peak_bytes:,.0f} bytes", f"1/{cost.peak_ratio:.2f}"),
        ("bit operations", f"{cost.bit_operations:,}", f"1/{cost.bit_operations_ratio:.2f}"),
    ]  # fmt: skip
    content = pictures + _table(("what", "amount", "of float"), rows, (1, 2))
    text = "For one sample, counted on the quantized graph; weights of products only."
    return _section("cost", "Cost", text, content)


def _bits(bits: int) -> str:
    return "float" if bits >= 32 else f"{bits} bits"


def _decisions(report: Report) -> str:
    if not report.decisions:
        return ""
    rows = [
        (
            f'<span class="pill {d.outcome}">{d.outcome}</span>', f"<code>{escape(d.by)}</code>",
            f"<code>{escape(d.site)}</code>", escape(d.reason),
            escape(", ".join(f"{k} {v:.4g}" for k, v in d.numbers.items())),
        )
        for d in report.decisions[:MAX_ROWS]
    ]  # fmt: skip
    counts = {
        o: sum(d.outcome == o for d in report.decisions) for o in ("applied", "kept", "refused")
    }
    text = ", ".join(f"{n} {o}" for o, n in counts.items() if n)
    content = _table(("outcome", "pass", "site", "reason", "measured"), rows)
    return _section("decisions", "Decisions and refusals", text, _folded(content, len(rows)))


def _layers(report: Report) -> str:
    rows = [
        (
            f"<code>{escape(r.node)}</code><br><span class='soft'>{escape(r.path)}</span>",
            escape(r.op), escape(r.role), escape(r.format),
            (f'<span style="border-left:4px solid {error_colour(r.sqnr)};padding-left:7px">'
            f"{'–' if math.isnan(r.sqnr) else f'{r.sqnr:.1f}'}</span>"),
            f"{escape(r.reason)}<br><span class='soft'>{escape(r.decided_by)}</span>",
        )
        for r in report.layers[:MAX_ROWS]
    ]  # fmt: skip
    content = _table(("node", "op", "operand", "format", "dB", "why"), rows, (4,))
    text = "Every quantized operand, the format it got, and the pass that chose it."
    if len(report.layers) > MAX_ROWS:
        text += f" The first {MAX_ROWS} of {len(report.layers)}."
    return _section("sites", "Site by site", text, _folded(content, len(rows)))


def _folded(content: str, count: int) -> str:
    opened = " open" if count <= 12 else ""
    return f"<details{opened}><summary>{count} rows</summary>{content}</details>"


def _steps(report: Report) -> str:
    known = [s.seconds for s in report.steps if not math.isnan(s.seconds)]
    longest = max(known, default=0.0)
    rows = [
        (
            f"<code>{escape(s.name)}</code>", "changed" if s.changed else "–",
            str(s.nodes), "–" if s.max_abs is None else f"{s.max_abs:.2g}",
            "–" if math.isnan(s.seconds) else f"{s.seconds:.2f}",
            "" if math.isnan(s.seconds) else time_bar(s.seconds, longest),
        )
        for s in report.steps
    ]  # fmt: skip
    head = ("pass", "graph", "nodes after", "largest difference", "seconds", "")
    text = "The passes in the order they ran; differences as measured by replaying the sample."
    content = _table(head, rows, (2, 3, 4))
    text_of = f"<pre class='mono'>{escape(report.pipeline)}</pre>"
    options = f"<details><summary>options</summary>{text_of}</details>"
    return _section("steps", "Pipeline", text, content + options)


def _parity(report: Report) -> str:
    parity = report.parity
    if parity is None:
        return ""
    verdict = '<span class="pill applied">equal</span>' if not parity.mismatches else (
        f'<span class="pill failed">{parity.mismatches} differ</span>'
    )  # fmt: skip
    rows = [("integer ↔ reference, each op on the same codes", f"{parity.codes:,}", verdict)]
    if parity.runtime_codes:
        share = parity.runtime_mismatches / parity.runtime_codes
        rows.append((
            "onnxruntime ↔ reference, free-running", f"{parity.runtime_codes:,}",
            (f"{parity.runtime_mismatches:,} differ ({share:.2e}), "
            f"by at most {parity.runtime_worst}"),
        ))  # fmt: skip
    text = "Do the backends compute the same codes?"
    return _section("parity", "Parity", text, _table(("comparison", "codes", "result"), rows, (1,)))


def _notes(report: Report) -> str:
    if not report.notes:
        return ""
    items = "".join(f"<li>{escape(note)}</li>" for note in report.notes)
    return _section("notes", "Notes", "Worth knowing.", f"<ul>{items}</ul>")
