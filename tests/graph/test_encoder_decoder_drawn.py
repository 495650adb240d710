# SPDX-License-Identifier: Apache-2.0
"""Levels, sides, blocks and skips of small drawn networks, each told in full."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from torch.fx import Node

from qgraph.graph.encoder_decoder import Placement, Shape, Side, find_structure
from qgraph.graph.resolutions import find_levels, live_nodes
from tests.graph.sketch import Sketch, aten


def pool(s: Sketch, x: Node, by: int = 2) -> Node:
    return s.call(aten.max_pool2d.default, x, [by, by])


def up(s: Sketch, x: Node, by: float = 2.0) -> Node:
    return s.call(aten.upsample_nearest2d.vec, x, None, [by, by])


def relu(s: Sketch, x: Node) -> Node:
    return s.call(aten.relu.default, x)


def cat(s: Sketch, *values: Node) -> Node:
    return s.call(aten.cat.default, list(values), 1)


@pytest.mark.parametrize("count", range(1, 14))
def test_pseudo_levels_rise_to_the_middle_of_a_chain_of_one_resolution(count):
    s = Sketch()
    x = s.input(2, 6, 4)
    for number in range(count):
        x = relu(s, s.linear(x, 4, name=f"fc{number}"))
    found = find_structure(s.returns(x))
    wanted = []
    for number in range(count):
        place = Fraction(number, max(count - 1, 1))
        level = int(min(place, 1 - place) * 8)
        side = Side.ENCODER if place < Fraction(1, 2) else Side.DECODER
        side = Side.BOTTLENECK if level == 4 else side
        if number in {0, count - 1}:
            side = Side.HEAD if number == count - 1 else Side.STEM
            wanted.append(Placement(level, side, str(side)))
        else:
            wanted.append(Placement(level, side, f"{side.value[0].upper()}{level}"))
    assert list(found.placements.values()) == wanted
    assert (found.shape, found.num_levels, found.skips) == (Shape.FLAT, 5, ())
    assert "one resolution" in found.notes[0]


def test_the_longest_path_counts_where_chains_meet() -> None:
    s = Sketch()
    x = s.input(2, 6, 4)
    start = s.linear(x, 4, name="start")
    long = start
    for number in range(3):
        long = s.linear(long, 4, name=f"long{number}")
    short = s.linear(start, 4, name="short")
    end = s.linear(s.call(aten.add.Tensor, long, short), 4, name="end")
    found = find_structure(s.returns(end)).placements
    assert [found[n.name].level for n in (start, short, long, end)] == [0, 2, 2, 0]
    assert found[short.name].side is Side.ENCODER
    assert found[long.name].side is Side.DECODER


@pytest.mark.parametrize(
    ("sizes", "levels"),
    [
        ([(26, 26), (20, 20)], [0, 1]), ([(25, 25), (20, 20)], [0, 0]),
        ([(32, 32), (16, 16), (8, 8)], [0, 1, 2]), ([(8, 8), (32, 32), (16, 16)], [2, 0, 1]),
        ([(40, 10), (20, 20), (10, 40)], [0, 0, 0]), ([(30, 30), (26, 26), (20, 20)], [0, 0, 1]),
        ([(30, 30), (24, 24), (20, 20)], [0, 1, 1]),
        ([(27, 27), (9, 9), (3, 3)], [0, 1, 2]), ([(40, 10), (10, 10)], [0, 1]),
        ([(32, 32), (16, 16), (14, 14)], [0, 1, 1]),
    ],
)  # fmt: skip
def test_levels_are_ranks_of_side_lengths_a_factor_of_1_3_apart(sizes, levels):
    s = Sketch()
    ends = [
        s.conv(s.input(2, 3, *size, name=f"x{i}"), 2, name=f"c{i}") for i, size in enumerate(sizes)
    ]
    found = find_levels(s.returns(*ends))
    assert [found.level[end] for end in ends] == levels
    assert found.num_levels == max(levels) + 1
    assert [found.resolution[end] for end in ends] == sizes


def ancestors(node: Node) -> set[Node]:
    found, pending = set(), [node]
    while pending:
        current = pending.pop()
        if current not in found:
            found.add(current)
            pending.extend(current.all_input_nodes)
    return found


def test_what_is_an_image_and_what_takes_its_level_from_what_it_reads() -> None:
    s = Sketch()
    x = s.input(2, 3, 16, 16)
    first = relu(s, s.conv(x, 4, name="first"))
    low = s.conv(pool(s, first), 4, name="low")
    point = s.call(aten.adaptive_avg_pool2d.default, low, [1, 1])
    gate = s.conv(point, 4, 1, name="gate")
    tokens = s.call(aten.flatten.using_ints, low, 2)
    mixed = s.linear(s.call(aten.reshape.default, low, [2, 4, 4, 16]), 16, name="mixed")
    soft = s.call(aten.softmax.int, s.call(aten.permute.default, low, [0, 2, 3, 1]), -1)
    scaled = s.call(aten.mul.Tensor, low, s.call(aten.sigmoid.default, gate))
    both = s.call(aten.add.Tensor, s.call(aten.mean.dim, first, [2, 3]), tokens_mean(s, tokens))
    mean = s.call(aten.avg_pool2d.default, first, [2, 2])
    module = s.returns(scaled, mixed, soft, both, mean)
    found = find_levels(module)
    size = (8, 8)
    assert found.resolution == {
        x: (16, 16), first: (16, 16), first.args[0]: (16, 16), low.args[0]: size, low: size,
        scaled: size, mean: size,
    }  # fmt: skip
    assert [found.level[n] for n in (x, first, low, gate, tokens, mixed, soft)] == [
        0, 0, 1, 1, 1, 1, 1,
    ]  # fmt: skip
    assert found.level[both] == 1
    live = live_nodes(module)
    assert x in live
    assert not any(n.op == "get_attr" for n in live)
    for node in live:
        before = [found.level[n] for n in ancestors(node) if n in found.level]
        after = [found.level[n] for n in live if node in ancestors(n) and n in found.level]
        assert found.deepest_before[node] == max(before)
        assert found.deepest_after[node] == max(after)


def tokens_mean(s: Sketch, tokens: Node) -> Node:
    return s.call(aten.mean.dim, tokens, [-1])


def u_net(s: Sketch, merge: str) -> dict[str, Node]:
    """Two levels with two convolutions each on the way down, and a skip that is merged."""
    n: dict[str, Node] = {}
    n["stem"] = s.conv(s.input(2, 1, 16, 16), 4, name="stem")
    n["encode"] = s.conv(relu(s, n["stem"]), 4, name="encode")
    skip = relu(s, n["encode"])
    n["down"] = s.conv(skip, 4, stride=2, name="down")
    n["bottom"] = s.conv(relu(s, n["down"]), 4, name="bottom")
    high = up(s, relu(s, n["bottom"]))
    if merge == "cat":
        n["merge"] = cat(s, high, skip)
    else:
        target = aten.add.Tensor if merge == "add" else aten.mul.Tensor
        n["merge"] = s.call(target, skip, high)
    n["decode"] = s.conv(n["merge"], 4, name="decode")
    n["head"] = s.conv(relu(s, n["decode"]), 1, name="head")
    return n


@pytest.mark.parametrize("merge", ["cat", "add", "mul"])
def test_a_u_net_is_told_in_full(merge):
    s = Sketch()
    n = u_net(s, merge)
    found = find_structure(s.returns(n["head"]))
    assert found.placements == {
        n["stem"].name: Placement(0, Side.STEM, "stem"),
        n["encode"].name: Placement(0, Side.ENCODER, "E0"),
        n["down"].name: Placement(1, Side.BOTTLENECK, "B1"),
        n["bottom"].name: Placement(1, Side.BOTTLENECK, "B1"),
        n["decode"].name: Placement(0, Side.DECODER, "D0"),
        n["head"].name: Placement(0, Side.HEAD, "head"),
    }
    (pair,) = found.skips
    assert (pair.level, pair.merge) == (0, n["merge"].name)
    assert pair.sources == (n["encode"].name,)
    assert pair.sinks == (n["decode"].name,)
    assert (found.shape, found.num_levels, found.notes) == (Shape.ENCODER_DECODER, 2, ())
    assert found.blocks()["B1"] == (n["down"].name, n["bottom"].name)


def test_parts_of_one_side_and_level_that_do_not_touch_are_blocks_of_their_own() -> None:
    s = Sketch()
    stem = s.conv(s.input(2, 1, 16, 16), 4, name="stem")
    left, right = s.conv(stem, 4, name="left"), s.conv(stem, 4, name="right")
    lows = [s.conv(pool(s, each), 4, name=f"low{i}") for i, each in enumerate((left, right))]
    more = s.conv(relu(s, lows[1]), 4, name="more")
    ends = [s.conv(each, 1, name=f"head{i}") for i, each in enumerate((lows[0], more))]
    found = find_structure(s.returns(*ends))
    blocks = {n: p.block for n, p in found.placements.items()}
    assert found.shape is Shape.PLAIN
    assert [blocks[n.name] for n in (left, right)] == ["E0", "E0"]
    assert [blocks[n.name] for n in (*lows, more)] == ["B1.0", "B1.1", "B1.1"]
    assert found.notes == ()


def test_a_decoder_level_without_an_encoder_is_noted() -> None:
    s = Sketch()
    x = s.conv(s.input(2, 1, 8, 8), 4, name="stem")
    x = s.conv(pool(s, x), 4, name="bottom")
    x = s.conv(up(s, x, 8.0), 4, name="decode")
    found = find_structure(s.returns(s.conv(x, 1, name="head")))
    assert found.num_levels == 3
    assert found.notes == (
        "decoder levels [0] have no encoder products; tied by level only",
        "no skip connections; decoder and encoder are tied by level only",
    )
    assert [p.level for p in found.placements.values()] == [1, 2, 0, 0]


@pytest.mark.parametrize(("gated", "side"), [(True, Side.GATE), (False, Side.ENCODER)])
def test_what_a_sigmoid_turns_into_a_factor_is_a_gate(gated, side):
    s = Sketch()
    stem = relu(s, s.conv(s.input(2, 1, 16, 16), 4, name="stem"))
    gate = s.conv(stem, 4, 1, name="gate")
    function = aten.sigmoid.default if gated else aten.relu.default
    x = s.call(aten.mul.Tensor, stem, s.call(function, gate))
    x = s.conv(pool(s, x), 4, name="low")
    found = find_structure(s.returns(s.conv(x, 1, name="head"))).placements
    assert found[gate.name].side is side
    assert found[gate.name].level == 0


@pytest.mark.parametrize(("merge", "side"), [("mul", Side.GATE), ("add", Side.ENCODER)])
def test_a_pooled_value_is_a_gate_where_it_multiplies_an_image(merge, side):
    s = Sketch()
    stem = relu(s, s.conv(s.input(2, 1, 16, 16), 4, name="stem"))
    point = s.call(aten.adaptive_avg_pool2d.default, stem, [1, 1])
    squeeze = s.conv(relu(s, s.conv(point, 2, 1, name="squeeze")), 4, 1, name="excite")
    target = aten.mul.Tensor if merge == "mul" else aten.add.Tensor
    x = s.conv(pool(s, s.call(target, stem, squeeze)), 4, name="low")
    found = find_structure(s.returns(s.conv(x, 1, name="head"))).placements
    assert found[squeeze.name].side is side
    assert [p.level for p in found.values()] == [0, 0, 0, 1, 1]
    assert torch.is_tensor(s.module.stem_weight)


def transposed(s: Sketch, x: Node) -> Node:
    weight = s.stored(torch.randn(4, 4, 2, 2), "grow")
    return s.call(aten.conv_transpose2d.input, x, weight, None, [2, 2])


def doubled(s: Sketch, x: Node) -> Node:
    return s.call(aten.add.Tensor, x, x)


# how a second value reaches the merge at level 1, and whether it crosses a level on the way
CROSSINGS: dict[str, tuple[Callable[[Sketch, Node], Node], bool]] = {
    "upsampled": (up, True),
    "upsampled and rectified": (lambda s, low: relu(s, up(s, relu(s, low))), True),
    "transposed convolution": (transposed, True),
    "rectified transposed convolution": (lambda s, low: relu(s, transposed(s, low)), True),
    "upsampled and convolved": (lambda s, low: s.conv(up(s, low), 4, name="smooth"), False),
    "upsampled and doubled": (lambda s, low: doubled(s, up(s, low)), False),
}


@pytest.mark.parametrize("name", CROSSINGS)
def test_blocks_end_where_a_value_of_another_level_is_added(name):
    draw, crosses = CROSSINGS[name]
    s = Sketch()
    x = s.conv(s.input(2, 1, 16, 16), 4, name="stem")
    x = s.conv(pool(s, x), 4, name="encode")
    low = s.conv(pool(s, x), 4, name="bottom")
    before = s.conv(relu(s, s.conv(up(s, low), 4, name="first")), 4, name="before")
    merged = s.call(aten.add.Tensor, before, draw(s, low))
    after = s.conv(merged, 4, name="after")
    found = find_structure(s.returns(s.conv(after, 1, name="head")))
    assert found.skips == ()
    blocks = [found.placements[n.name].block for n in (before, after)]
    assert blocks[0].startswith("D1")
    assert blocks[1].startswith("D1")
    assert (blocks[0] != blocks[1]) is crosses
