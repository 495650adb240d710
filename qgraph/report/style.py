# SPDX-License-Identifier: Apache-2.0
"""The look of the HTML report: one style sheet, light and dark, and its colour scales."""

from __future__ import annotations

import math

# Blue is good, red is bad; both ends stay apart for colour-blind readers.
_ERROR_SCALE = (
    (5.0, "#a50026"), (10.0, "#d73027"), (15.0, "#f46d43"), (20.0, "#fdae61"),
    (25.0, "#fee090"), (30.0, "#abd9e9"), (40.0, "#74add1"), (math.inf, "#4575b4"),
)  # fmt: skip
_BITS_SCALE = (
    (2, "#7f2704"), (3, "#b5410a"), (4, "#e8680f"), (5, "#fd9243"), (6, "#fdbe85"),
    (7, "#c6dbef"), (8, "#6baed6"), (16, "#2171b5"), (32, "#d4d4d8"),
)  # fmt: skip
UNKNOWN = "#d4d4d8"


def error_colour(decibels: float) -> str:
    """Colour of a signal-to-noise ratio."""
    if math.isnan(decibels):
        return UNKNOWN
    return next((c for limit, c in _ERROR_SCALE if decibels < limit), _ERROR_SCALE[-1][1])


def bits_colour(bits: int) -> str:
    """Colour of a bit width."""
    return next((c for limit, c in _BITS_SCALE if bits <= limit), UNKNOWN)


def error_legend() -> list[tuple[str, str]]:
    """Colours with their meaning."""
    texts, low = [], ""
    for limit, colour in _ERROR_SCALE:
        texts.append((colour, f"≥ {low}" if math.isinf(limit) else f"< {limit:.0f}"))
        low = f"{limit:.0f}"
    return [*texts, (UNKNOWN, "not measured")]


def bits_legend(present: set[int]) -> list[tuple[str, str]]:
    """Colours of the widths that occur."""
    return [(bits_colour(b), "float" if b >= 32 else f"{b} bits") for b in sorted(present)]


SHEET = """
:root{color-scheme:light dark;--bg:#fafaf9;--card:#fff;--ink:#1c1917;--soft:#78716c;--line:#e7e5e4;
--accent:#2563eb;--good:#15803d;--bad:#b91c1c;--warn:#b45309;--track:#f1f0ee}
@media(prefers-color-scheme:dark){:root{--bg:#171614;--card:#211f1d;--ink:#f0eeec;--soft:#a8a29e;
--line:#37332f;--accent:#7aa2ff;--good:#4ade80;--bad:#f87171;--warn:#fbbf24;--track:#2b2825}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);
font:14px/1.5 ui-sans-serif,system-ui,-apple-system,"Segoe UI",Roboto,Arial,sans-serif}
main{max-width:1240px;margin:0 auto;padding:36px 24px 80px}
header h1{font-size:27px;letter-spacing:-.02em;margin:0}
header p{color:var(--soft);margin:4px 0 0}
nav{margin:14px 0 22px;display:flex;gap:18px;flex-wrap:wrap;font-size:13px}
nav a{color:var(--accent);text-decoration:none}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(170px,1fr));gap:12px}
.tile,section{background:var(--card);border:1px solid var(--line);border-radius:12px}
.tile{padding:14px 16px}
.tile b{display:block;font-size:23px;font-weight:650;letter-spacing:-.02em}
.tile span{color:var(--soft);font-size:12px}
.tile small{display:block;color:var(--soft);font-size:12px;overflow:hidden;text-overflow:ellipsis}
section{margin-top:18px;padding:20px 22px}
h2{font-size:16px;margin:0 0 2px;letter-spacing:-.01em}
section>p{color:var(--soft);margin:0 0 14px;font-size:13px}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:12.5px}
th{text-align:left;font-weight:600;color:var(--soft);border-bottom:1px solid var(--line);
padding:5px 10px 5px 0;white-space:nowrap}
td{padding:4px 10px 4px 0;border-bottom:1px solid var(--line);vertical-align:top}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
tr:last-child td{border-bottom:0}
code,.mono{font:12px ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
.soft{color:var(--soft)}
.pill{display:inline-block;border-radius:99px;padding:0 9px;font-size:11.5px;font-weight:600;
border:1px solid currentColor}
.applied{color:var(--good)}.kept{color:var(--soft)}.refused{color:var(--warn)}
.failed{color:var(--bad)}
.legend{display:flex;gap:14px;flex-wrap:wrap;font-size:12px;color:var(--soft);margin:10px 0 0}
.legend i{display:inline-block;width:12px;height:12px;border-radius:3px;margin-right:5px;
vertical-align:-2px}
svg{display:block;max-width:100%;height:auto}
svg text{fill:var(--ink);
font:11px ui-sans-serif,system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
svg .soft{fill:var(--soft)}
svg .track{fill:var(--track)}
svg .edge{fill:none;stroke:var(--soft);stroke-opacity:.38;stroke-width:1.1}
svg .node text{fill:#1c1917;font-size:10.5px;font-weight:600;text-anchor:middle}
svg .label{font-size:9px;text-anchor:middle}
svg rect.op{stroke:#0003;stroke-width:1}
svg rect.float{stroke:var(--soft);stroke-dasharray:3 2}
.switch{display:inline-flex;border:1px solid var(--line);border-radius:8px;overflow:hidden;
font-size:12.5px;margin:0 0 12px}
.switch label{padding:4px 13px;cursor:pointer;color:var(--soft)}
.choice{position:absolute;opacity:0;pointer-events:none}
#by-error:checked~.switch label[for=by-error],#by-bits:checked~.switch label[for=by-bits]{
background:var(--accent);color:#fff}
#by-bits:checked~.scroll rect.op{fill:var(--b)}
#by-error:checked~.scroll rect.op{fill:var(--e)}
#by-error:checked~.of-bits,#by-bits:checked~.of-error{display:none}
.two{display:grid;grid-template-columns:repeat(auto-fit,minmax(480px,1fr));gap:6px 30px}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(270px,1fr));gap:14px;
margin-top:12px}
figure{margin:0}
.cards figure{border:1px solid var(--line);border-radius:10px;padding:9px 12px}
.cards figcaption{display:flex;gap:7px;align-items:center;font-size:12.5px}
.cards figcaption b{flex:1;overflow:hidden;text-overflow:ellipsis;white-space:nowrap}
.cards figcaption i{width:10px;height:10px;border-radius:3px}
.cards small{display:block;color:var(--soft);font-size:11px;white-space:nowrap;overflow:hidden;
text-overflow:ellipsis}
.cards svg{margin:5px 0 1px}
svg .hill{fill:var(--accent);fill-opacity:.22}
svg .bars{stroke:var(--accent);stroke-width:2.6;stroke-opacity:.8}
svg .ticks{stroke:var(--warn);stroke-width:1}
svg .base{stroke:var(--line)}svg .zero{stroke:var(--soft);stroke-dasharray:2 3;stroke-opacity:.6}
.strip{display:grid;grid-template-columns:repeat(4,minmax(90px,180px));gap:12px;margin-bottom:12px}
.strip img{width:100%;border-radius:8px;display:block;image-rendering:pixelated}
.strip figcaption{font-size:11.5px;color:var(--soft);margin-top:3px}
details summary{cursor:pointer;color:var(--accent);font-size:13px;margin:6px 0}
pre{margin:0;white-space:pre-wrap}
"""
