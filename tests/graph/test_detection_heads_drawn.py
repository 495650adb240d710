# SPDX-License-Identifier: Apache-2.0
"""Parts of detectors in small drawn graphs, where each rule decides alone."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from torch.fx import GraphModule, Node

from qgraph.graph.detection_heads import (
    DetectionHeads,
    find_heads,
    last_products,
    shared_weights,
)
from tests.graph.sketch import Sketch, aten


def names(nodes: Iterable[Node]) -> list[str]:
    return sorted(n.name for n in nodes)


def trunk(s: Sketch, channels: int = 5) -> Node:
    return s.call(aten.relu.default, s.conv(s.input(2, 3, 8, 8), channels, name="body"))


def heads(module: GraphModule, **options: tuple[str, ...]) -> DetectionHeads:
    found = find_heads(module, **options)
    assert isinstance(found, DetectionHeads), found
    return found


def rows(s: Sketch, x: Node, channels: int) -> Node:
    """[2, 64, C] from a map [2, C, 8, 8]."""
    return s.call(aten.reshape.default, s.call(aten.permute.default, x, [0, 2, 3, 1]),
                  [2, 64, channels])  # fmt: skip


def test_branches_hold_what_one_kind_of_output_alone_depends_on() -> None:
    s = Sketch()
    neck = trunk(s)
    tower = s.call(aten.relu.default, s.conv(neck, 6, name="tower"))
    box = s.conv(tower, 4, name="box")
    score = s.conv(neck, 7, name="score")
    quality = s.conv(tower, 1, name="quality")
    module = s.returns(box, score, quality)
    found = heads(module)
    assert (found.boxes, found.classes, found.others) == ((box,), (score,), (quality,))
    relu = tower
    assert found.regression == {box, relu, relu.args[0]}
    assert found.classification == {score}
    assert found.head == found.regression | {score, quality}
    assert found.necks == (neck,)
    assert found.last == (box, score, quality)
    assert found.joined == frozenset()
    assert found.describe() == (
        "1 neck outputs, 2 products for boxes, 1 for classes, 3 last layers,"
        " 0 weights shared over levels"
    )


WIDTHS = {
    # of outputs -> which are boxes, which are classes, which are neither
    "four and many": ([4, 9], [0], [1], []),
    "many and four": ([9, 4], [1], [0], []),
    "one number is no class": ([4, 1, 2], [0], [2], [1]),
    "two boxes": ([4, 3, 4], [0, 2], [1], []),
}


@pytest.mark.parametrize("maps", [False, True])
@pytest.mark.parametrize("name", WIDTHS)
def test_four_numbers_are_a_box_and_other_numbers_a_class(name, maps):
    widths, boxes, classes, others = WIDTHS[name]
    s = Sketch()
    neck = trunk(s)
    ends = [s.conv(neck, width, 1, name=f"end{i}") for i, width in enumerate(widths)]
    if not maps:
        ends = [rows(s, end, width) for end, width in zip(ends, widths, strict=True)]
    found = heads(s.returns(*ends))
    assert list(found.boxes) == [ends[i] for i in boxes]
    assert list(found.classes) == [ends[i] for i in classes]
    assert list(found.others) == [ends[i] for i in others]


def test_probabilities_of_four_classes_are_no_boxes() -> None:
    s = Sketch()
    neck = trunk(s)
    box = s.conv(neck, 4, name="box")
    sure = s.call(aten.sigmoid.default, s.conv(neck, 4, name="score"))
    found = heads(s.returns(box, sure))
    assert (found.boxes, found.classes) == ((box,), (sure,))
    only = Sketch()
    neck = trunk(only)
    lone = only.call(aten.sigmoid.default, only.conv(neck, 4, name="score"))
    refused = find_heads(only.returns(lone, only.conv(neck, 7, name="other")))
    assert isinstance(refused, str)
    assert refused.startswith("no box output among ['sigmoid_default', 'conv2d_default_2']")
    boxes = Sketch()
    refused = find_heads(boxes.returns(boxes.conv(trunk(boxes), 4, name="box")))
    assert isinstance(refused, str)
    assert refused.startswith("no class output")


@pytest.mark.parametrize("layout", ["rows", "maps"])
@pytest.mark.parametrize("order", [(4, 7), (7, 4), (4, 7, 1)])
def test_one_concatenation_of_boxes_and_scores_is_taken_apart(layout, order):
    s = Sketch()
    neck = trunk(s)
    parts = [s.conv(neck, width, name=f"end{i}") for i, width in enumerate(order)]
    if layout == "rows":
        parts = [rows(s, part, width) for part, width in zip(parts, order, strict=True)]
    joined = s.call(aten.cat.default, parts, -1 if layout == "rows" else 1)
    whole = s.call(aten.mul.Tensor, joined, 2.0)
    found = heads(s.returns(whole))
    assert list(found.boxes) == [p for p, w in zip(parts, order, strict=True) if w == 4]
    assert list(found.classes) == [p for p, w in zip(parts, order, strict=True) if w == 7]
    assert found.joined == {joined, whole}


def test_levels_joined_along_rows_are_looked_through_and_other_axes_do_not_join() -> None:
    s = Sketch()
    neck = trunk(s)
    levels = []
    for name in ("a", "b"):
        box, score = s.conv(neck, 4, name=f"box{name}"), s.conv(neck, 3, name=f"score{name}")
        levels.append(s.call(aten.cat.default, [rows(s, box, 4), rows(s, score, 3)], 2))
    both = s.call(aten.cat.default, levels, 1)
    found = heads(s.returns(both))
    assert len(found.boxes) == len(found.classes) == 1
    assert both in found.joined
    s = Sketch()
    neck = trunk(s)
    four = s.conv(neck, 4, name="box")
    along_rows = s.call(aten.cat.default, [four, s.conv(neck, 4, name="more")], 2)
    found = heads(s.returns(along_rows, s.conv(neck, 7, name="score")))
    assert found.boxes == (along_rows,)
    assert not found.joined
    s = Sketch()
    neck = trunk(s)
    along_batch = s.call(aten.cat.default, [s.conv(neck, 4, name="a"), s.conv(neck, 4, name="b")])
    found = heads(s.returns(along_batch, s.conv(neck, 7, name="score")))
    assert found.boxes == (along_batch,)
    assert not found.joined
    s = Sketch()
    neck = trunk(s)
    pair = [s.conv(neck, 4, name="one"), s.conv(neck, 4, name="two")]
    equal = s.call(aten.cat.default, pair, 1)
    found = heads(s.returns(equal, s.conv(neck, 4, name="box")))
    assert found.classes == (equal,)


def test_globs_choose_outputs_and_the_head() -> None:
    s = Sketch()
    neck = trunk(s)
    tower = s.call(aten.relu.default, s.conv(neck, 6, name="tower"), within="tower")
    first, second = s.conv(tower, 12, name="first"), s.conv(neck, 4, name="second.0")
    module = s.returns(first, second)
    found = heads(module, boxes=("first",), classes=("second",))
    assert (found.boxes, found.classes) == ((first,), (second,))
    found = heads(module, classes=("second*",), boxes=("first_weight",))
    assert (found.boxes, found.classes) == ((first,), (second,))
    found = heads(module, boxes=("first",), classes=("second",), head=("tower", "second"))
    assert found.head == {tower, tower.args[0], second}
    assert names(found.last) == names([second])
    assert found.necks == (neck,)
    refused = find_heads(module, classes=("second",))
    assert isinstance(refused, str)
    assert "no box output" in refused


def test_outputs_of_the_same_layers_have_no_head() -> None:
    s = Sketch()
    x = s.conv(trunk(s), 11, name="all")
    box = s.call(aten.slice.Tensor, x, 1, 0, 4)
    score = s.call(aten.slice.Tensor, x, 1, 4, 11)
    refused = find_heads(s.returns(box, score))
    assert refused == "boxes and classes come out of the same layers: there is no head of their own"


def test_integers_are_no_outputs_and_last_layers_have_no_product_behind_them() -> None:
    s = Sketch()
    neck = trunk(s)
    one = s.conv(neck, 4, name="one")
    two = s.conv(s.call(aten.relu.default, one), 4, name="two")
    score = s.conv(neck, 3, name="score")
    best = s.call(aten.argmax.default, score, 1)
    module = s.returns(two, score, best)
    assert heads(module).others == ()
    nodes = list(module.graph.nodes)
    members = frozenset({one, two, score})
    assert last_products(nodes, members) == (two, score)
    assert last_products(nodes, frozenset({one, score})) == (score,)
    assert last_products(nodes, frozenset()) == ()


def test_weights_read_by_two_products_or_more_are_shared() -> None:
    s = Sketch()
    x = trunk(s)
    first, second, third = (s.conv(x, 5, name="tower") for _ in range(3))
    other = s.conv(third, 4, name="box")
    pair = [s.conv(each, 5, name="pair") for each in (first, second)]
    module = s.returns(*pair, other)
    nodes = list(module.graph.nodes)
    assert shared_weights(module, nodes) == {
        "tower_weight": (first, second, third), "pair_weight": tuple(pair)
    }  # fmt: skip
