# SPDX-License-Identifier: Apache-2.0
"""Pictures are well-formed and show every number."""

from __future__ import annotations

import math
from xml.etree import ElementTree as ET

from qgraph.report.heatmap import curves, heat_map


def test_a_heat_map_shows_every_number_and_darkens_with_it():
    cells = {"E0 <a>": {"W2": 1.0, "W4": 0.01}, "B1": {"W2": 100.0, "A2": math.nan}}
    text = heat_map(cells, title="a & b")
    root = ET.fromstring(text)
    shown = [t.text for t in root.iter() if t.tag.endswith("text")]
    assert {"1", "0.01", "100", "nan", "E0 <a>", "a & b"} <= set(shown)
    fills = [t.get("fill") for t in root.iter() if t.tag.endswith("rect")][1:]
    assert fills[1] == "#ffffcc"
    assert fills[2] == "#b10026"


def test_a_heat_map_without_spread_or_numbers_is_still_a_picture():
    for cells in ({}, {"a": {"W2": 0.0}}, {"a": {"W2": 3.0}}):
        ET.fromstring(heat_map(cells, title="t"))
        ET.fromstring(heat_map(cells, title="t", is_logarithmic=False))


def test_curves_have_a_point_for_every_answer():
    text = curves(
        {"free": [(0.1, 5.0), (0.2, 1.0)], "one": [(0.3, 2.0)]}, title="t", axes=("x", "y")
    )
    root = ET.fromstring(text)
    assert sum(t.tag.endswith("circle") for t in root.iter()) == 3
    ET.fromstring(curves({}, title="t", axes=("x", "y")))
