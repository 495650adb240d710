# SPDX-License-Identifier: Apache-2.0
"""Parts of detectors at the edges of their rules: axes, ranks, widths, two readers of one value."""

from __future__ import annotations

import pytest
from torch.fx import Node

from qgraph.graph.detection_heads import DetectionHeads, find_heads, last_products, shared_weights
from tests.graph.sketch import Sketch, aten


def trunk(s: Sketch, channels: int = 5) -> Node:
    return s.call(aten.relu.default, s.conv(s.input(2, 3, 8, 8), channels, name="body"))


def found_in(s: Sketch, *outputs: Node, **options: tuple[str, ...]) -> DetectionHeads:
    found = find_heads(s.returns(*outputs), **options)
    assert isinstance(found, DetectionHeads), found
    return found


SHAPES = {
    # shapes of the joined values, the axis, whether that makes rows of boxes and scores
    "rows by their last axis": ((2, 6, 4), (2, 6, 7), -1, True),
    "rows, the axis from the front": ((2, 6, 7), (2, 6, 4), 2, True),
    "rows one below the other": ((2, 4, 5), (2, 7, 5), 1, False),
    "rows of a batch": ((4, 6, 5), (7, 6, 5), 0, False),
    "maps by their channels": ((2, 4, 6, 5), (2, 7, 6, 5), 1, True),
    "maps, the axis from the end": ((2, 7, 6, 5), (2, 4, 6, 5), -3, True),
    "maps side by side": ((2, 5, 6, 4), (2, 5, 6, 7), 3, False),
    "maps one below the other": ((2, 5, 4, 6), (2, 5, 7, 6), 2, False),
    "a table": ((6, 4), (6, 7), 1, False),
    "a vector": ((4,), (7,), 0, False),
    "boxes only": ((2, 6, 4), (2, 6, 4), 2, False),
    "scores only": ((2, 6, 5), (2, 6, 7), 2, False),
}


@pytest.mark.parametrize("name", SHAPES)
def test_boxes_and_scores_are_joined_by_the_axis_that_holds_their_numbers(name):
    first, second, axis, apart = SHAPES[name]
    s = Sketch()
    parts = [
        s.call(aten.relu.default, s.input(*shape, name=f"x{i}"))
        for i, shape in enumerate((first, second))
    ]
    whole = s.call(aten.cat.default, parts, axis)
    more = s.linear(s.input(2, 3, 9, name="more"), 7, name="score")
    wide = s.linear(s.input(2, 3, 9, name="wide"), 4, name="box")
    found = found_in(s, whole, more, wide)
    told = {*found.boxes, *found.classes, *found.others} - {more, wide}
    assert told == (set(parts) if apart else {whole})
    assert found.joined == ({whole} if apart else frozenset())
    if apart:
        assert parts[0 if 4 in first else 1] in found.boxes


def test_what_a_backbone_joins_is_no_output() -> None:
    s = Sketch()
    x = trunk(s)
    four, five = s.conv(x, 4, name="four"), s.conv(x, 5, name="five")
    neck = s.call(aten.relu.default, s.call(aten.cat.default, [four, five], 1))
    box, score = s.conv(neck, 4, name="box"), s.conv(neck, 3, name="score")
    found = found_in(s, box, score)
    assert (found.boxes, found.classes, found.joined) == ((box,), (score,), frozenset())
    assert found.necks == (neck,)


def test_a_neck_that_another_neck_reads_as_well_is_one() -> None:
    s = Sketch()
    x = trunk(s)
    upper = s.call(aten.relu.default, s.conv(x, 5, name="upper"))
    lower = s.call(aten.add.Tensor, x, s.conv(upper, 5, name="lower"))
    ends = [
        s.conv(neck, width, name=f"{kind}{i}")
        for kind, width in (("box", 4), ("score", 3))
        for i, neck in enumerate((upper, lower))
    ]
    found = found_in(s, *ends)
    assert found.necks == (upper, lower)
    assert found.boxes == tuple(ends[:2])
    assert found.last == tuple(sorted(ends, key=list(s.module.graph.nodes).index))


def test_a_product_is_last_only_if_no_way_leads_to_another() -> None:
    s = Sketch()
    x = trunk(s)
    first = s.conv(x, 4, name="first")
    aside = s.call(aten.exp.default, first)
    second = s.conv(s.call(aten.relu.default, first), 3, name="second")
    module = s.returns(aside, first, second)
    nodes = list(module.graph.nodes)
    assert last_products(nodes, frozenset(nodes)) == (second,)
    assert last_products(nodes, frozenset({first})) == ()


def test_what_two_products_of_values_read_is_no_weight() -> None:
    s = Sketch()
    x, y = s.input(2, 3, 4), s.input(2, 4, 3, name="y")
    value = s.call(aten.relu.default, y)
    pair = [s.call(aten.matmul.default, each, value) for each in (x, s.call(aten.exp.default, x))]
    module = s.returns(*pair)
    assert shared_weights(module, module.graph.nodes) == {}
    s = Sketch()
    x = trunk(s)
    lone = s.conv(x, 5, name="lone")
    again = [s.conv(each, 5, name="again") for each in (x, lone, x)]
    module = s.returns(*again)
    assert shared_weights(module, module.graph.nodes) == {"again_weight": tuple(again)}


def test_numbers_without_an_axis_free_widths_and_missing_outputs_are_neither() -> None:
    s = Sketch()
    neck = trunk(s)
    box, score = s.conv(neck, 4, name="box"), s.conv(neck, 2, name="score")
    total = s.call(aten.sum.default, score)
    free = s.call(aten.exp.default, s.input(5, 6, 7, name="free", free=3))
    vector = s.call(aten.sum.dim_IntList, score, [1, 2, 3])
    s.graph.output((box, None, score, total, free, vector, 3))
    s.module.recompile()
    found = find_heads(s.module)
    assert isinstance(found, DetectionHeads)
    assert (found.boxes, found.classes) == ((box,), (score, vector))
    assert found.others == (total, free)


def test_outputs_that_look_like_boxes_beside_named_ones_are_no_classes() -> None:
    s = Sketch()
    neck = trunk(s)
    named, other = s.conv(neck, 4, name="named"), s.conv(neck, 4, name="other")
    score, one = s.conv(neck, 3, name="score"), s.conv(neck, 1, name="one")
    found = found_in(s, named, other, score, one, boxes=("named",))
    assert (found.boxes, found.classes, found.others) == ((named,), (score,), (other, one))
    s = Sketch()
    neck = trunk(s)
    wide, score = s.conv(neck, 12, name="wide"), s.conv(neck, 3, name="score")
    found = found_in(s, wide, score, boxes=("wide",))
    assert (found.boxes, found.classes, found.others) == ((wide,), (score,), ())
    assert found.regression == {wide}


def test_a_head_that_was_named_needs_no_product_of_its_own() -> None:
    s = Sketch()
    x = s.conv(trunk(s), 11, name="all")
    box = s.call(aten.slice.Tensor, x, 1, 0, 4, within="cut")
    score = s.call(aten.slice.Tensor, x, 1, 4, 11)
    found = found_in(s, box, score, head=("all",))
    assert found.head == {x}
    assert found.last == (x,)
    assert found.necks == (x.args[0],)


def test_shared_levels_are_counted_in_the_report() -> None:
    s = Sketch()
    necks = [trunk(s), s.call(aten.exp.default, s.input(2, 5, 4, 4, name="low"))]
    ends = [s.conv(neck, width, name=f"w{width}") for width in (4, 3) for neck in necks]
    assert found_in(s, *ends).describe() == (
        "2 neck outputs, 2 products for boxes, 2 for classes, 4 last layers,"
        " 2 weights shared over levels"
    )
