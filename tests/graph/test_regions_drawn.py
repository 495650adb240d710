# SPDX-License-Identifier: Apache-2.0
"""Regions of graphs drawn by hand: cuts against their definition, and how spans are joined."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx import GraphModule, Node

from qgraph.graph.ops import product
from qgraph.graph.regions import Region, cut_points, find_regions
from tests.graph.sketch import Sketch, aten

WIDTH = 4


def random_graph(seed: int) -> GraphModule:
    """Linears, functions and sums of any two earlier values."""
    draw, s = random.Random(seed), Sketch()
    values = [s.input(3, WIDTH, free=1), s.input(3, WIDTH, name="y", free=1)]
    for number in range(draw.randint(2, 9)):
        kind = draw.choice(["linear", "linear", "relu", "add"])
        recent = values[-3:]
        if kind == "linear":
            values.append(s.linear(draw.choice(recent), WIDTH, name=f"fc{number}"))
        elif kind == "relu":
            values.append(s.call(aten.relu.default, draw.choice(recent)))
        else:
            values.append(s.call(aten.add.Tensor, draw.choice(recent), draw.choice(values)))
    ends = draw.sample(values[2:], min(2, len(values) - 2))
    return s.returns(*ends)


def calls_of(module: GraphModule) -> list[Node]:
    return [n for n in module.graph.nodes if n.op == "call_function"]


def moving(module: GraphModule) -> set[Node]:
    """What depends on a weight, or is one."""
    found: set[Node] = set()
    for node in calls_of(module):
        if product(node) or any(i in found for i in node.all_input_nodes):
            found.add(node)
    return found


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 100_000), st.integers(1, 3))
def test_cuts_lie_where_few_moving_values_are_read_later(seed, width):
    module = random_graph(seed)
    calls, moves = calls_of(module), moving(module)
    wanted = []
    for at, node in enumerate(calls):
        later = set(calls[at + 1 :])
        alive = [v for v in calls[: at + 1] if v in moves and later & set(v.users)]
        if 1 <= len(alive) <= width:
            wanted.append(node.name)
    assert cut_points(module, width=width) == wanted
    assert cut_points(module) == cut_points(module, width=1)


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 100_000), st.integers(1, 3))
def test_regions_name_what_they_read_and_what_is_read_of_them(seed, limit):
    module = random_graph(seed)
    calls, moves = calls_of(module), moving(module)
    by_name = {n.name: n for n in module.graph.nodes}
    for granularity in ("layer", "subblock", "block", "auto"):
        regions = find_regions(module, granularity, max_products=limit)
        assert [name for r in regions for name in r.nodes] == [n.name for n in calls]
        for region in regions:
            inside = {by_name[name] for name in region.nodes}
            read = {i for n in inside for i in n.all_input_nodes} - inside
            assert set(region.inputs) == {n.name for n in read if n.op != "get_attr"}
            order = [list(module.graph.nodes).index(by_name[n]) for n in region.inputs]
            assert order == sorted(order)
            assert list(region.outputs) == [
                n.name for n in calls if n in inside and set(n.users) - inside
            ]
            assert list(region.weights) == [n.name for n in calls if n in inside and product(n)]
            ports = {*region.inputs, *region.outputs}
            assert region.moving == {n for n in ports if by_name[n] in moves}
        weightless = [r for r in regions if not r.weights]
        assert not weightless or len(regions) == 1


def chain(*names: str) -> tuple[Sketch, Node]:
    """Linears one after the other, each in the module of its name, with a function behind."""
    s = Sketch()
    x = s.input(3, WIDTH, free=1)
    for name in names:
        x = s.linear(x, WIDTH, name=name)
        x = s.call(aten.relu.default, x, within=name)
    return s, x


def named(regions: list[Region]) -> list[tuple[str, int]]:
    return [(r.name, len(r.weights)) for r in regions]


def test_blocks_are_repeated_modules_with_weights_of_their_own() -> None:
    names = ["stem", "body.0.a", "body.0.b", "body.1.a", "body.1.b", "tail.0", "tail.1", "head"]
    s, x = chain(*names)
    module = s.returns(x)
    assert named(find_regions(module, "block")) == [
        ("stem", 1), ("body.0", 2), ("body.1", 2), ("tail.0", 1), ("tail.1", 1), ("head", 1),
    ]  # fmt: skip
    assert named(find_regions(module, "stage")) == [
        ("stem", 1), ("body", 4), ("tail.0", 1), ("tail.1", 1), ("head", 1),
    ]  # fmt: skip
    assert named(find_regions(module, "layer")) == [(n, 1) for n in names]
    assert named(find_regions(module, "subblock")) == [(n, 1) for n in names]
    assert find_regions(module) == find_regions(module, "auto")


def test_a_numbered_module_without_a_sibling_is_no_block() -> None:
    s, x = chain("body.0.a", "body.0.b", "other.0.a", "other.0.b", "other.1.a")
    assert named(find_regions(s.returns(x), "block")) == [
        ("body.0.a", 1), ("body.0.b", 1), ("other.0", 2), ("other.1.a", 1),
    ]  # fmt: skip


def test_the_innermost_repeated_module_counts_and_the_same_one_is_joined_only_next_to_itself() -> (
    None
):
    s, x = chain("a.0.x.0.p", "a.0.x.0.q", "a.0.x.1.p", "a.1.x.0.p", "c", "a.0.x.0.p")
    assert named(find_regions(s.returns(x), "block")) == [
        ("a.0.x.0", 2), ("a.0.x.1.p", 1), ("a.1.x.0.p", 1), ("c", 1), ("a.0.x.0.p", 1),
    ]  # fmt: skip


def around(before: str, between: str, after: str, *, op: str = "exp") -> list[tuple[str, ...]]:
    """Nodes by region where a part without weights stands between two linears."""
    s = Sketch()
    x = s.linear(s.input(3, WIDTH, free=1), WIDTH, name=before)
    if op == "norm":
        x = s.call(aten.layer_norm.default, x, [WIDTH], within=between)
    else:
        x = s.call(aten.exp.default, x, within=between)
    x = s.linear(x, WIDTH, name=after)
    module = s.returns(x)
    short = {n.name: n.name.split("_")[0] for n in module.graph.nodes}
    return [tuple(short[n] for n in r.nodes) for r in find_regions(module, "subblock")]


@pytest.mark.parametrize(
    ("before", "between", "after", "op", "ahead"),
    [
        ("a.0", "a.1", "b.0", "exp", False), ("a.0", "b.1", "b.0", "exp", True),
        ("a.0", "a.1", "a.2", "exp", False), ("a.0", "a.1", "a.2", "norm", True),
        ("a.0", "a.1", "b.0", "norm", False), ("a", "b", "c", "exp", False),
        ("a", "b", "c", "norm", True), ("a.b.0", "a.b.1", "a.c.0", "norm", False),
    ],
)  # fmt: skip
def test_parts_without_weights_join_the_nearer_module_and_norms_what_follows(
    before, between, after, op, ahead
):
    middle = "layer" if op == "norm" else "exp"
    wanted = [("linear",), (middle, "linear")] if ahead else [("linear", middle), ("linear",)]
    assert around(before, between, after, op=op) == wanted


def test_what_comes_before_the_first_weight_and_after_the_last_joins_them() -> None:
    s = Sketch()
    x = s.call(aten.relu.default, s.input(3, WIDTH, free=1))
    x = s.linear(s.call(aten.exp.default, x), WIDTH, name="a")
    x = s.call(aten.tanh.default, s.linear(x, WIDTH, name="b"))
    module = s.returns(s.call(aten.exp.default, x))
    assert [len(r.nodes) for r in find_regions(module, "subblock")] == [3, 3]
    s = Sketch()
    module = s.returns(s.call(aten.relu.default, s.call(aten.exp.default, s.input(3, 4))))
    (only,) = find_regions(module)
    assert (only.weights, only.moving, len(only.nodes)) == ((), frozenset(), 2)
    assert only.name == only.nodes[-1]
    s = Sketch()
    assert find_regions(s.returns(s.input(3, 4))) == []
    started = find_regions(module, starts=frozenset({"exp_default"}))
    assert started[0].moving >= {"relu_default"} or len(started) > 1


def parallel(count: int) -> GraphModule:
    """A linear, then so many that all read it, whose values are kept until the end."""
    s = Sketch()
    x = s.linear(s.input(3, WIDTH, free=1), WIDTH, name="first")
    values = [s.linear(x, WIDTH, name=f"side{i}") for i in range(count)]
    return s.returns(s.linear(s.call(aten.cat.default, values, 1), WIDTH, name="last"))


@pytest.mark.parametrize(("count", "limit", "weights"), [
    (2, 12, [1, 2, 1]), (3, 3, [1, 3, 1]), (3, 2, [1, 3, 1]), (5, 5, [1, 5, 1]),
    (5, 4, [1, 1, 4, 1]), (8, 4, None), (8, 8, [1, 8, 1]),
])  # fmt: skip
def test_wide_parts_are_cut_only_where_they_hold_too_many_weights(count, limit, weights):
    found = [len(r.weights) for r in find_regions(parallel(count), max_products=limit)]
    assert sum(found) == count + 2
    assert weights is None or found == weights
    assert max(found) <= max(limit, 4) or count == 8


def pyramid(levels: int, between: int) -> GraphModule:
    """A head read at every level, and linears of their own in between."""
    s = Sketch()
    x, ends = s.input(3, WIDTH, free=1), []
    for level in range(levels):
        for number in range(between):
            x = s.linear(x, WIDTH, name=f"level{level}.part{number}")
        x = s.linear(x, WIDTH, name="head")
        ends.append(x)
    return s.returns(s.linear(x, WIDTH, name="last"))


@pytest.mark.parametrize(("levels", "between", "limit", "wanted"), [
    (3, 1, 12, [1, 5, 1]), (3, 1, 3, [1, 5, 1]), (3, 1, 2, [1] * 7), (2, 2, 3, [1, 1, 4, 1]),
    (2, 2, 2, [1] * 7), (1, 2, 12, [1] * 4),
])  # fmt: skip
def test_readers_of_one_weight_are_one_region_while_few_weights_lie_between(
    levels, between, limit, wanted
):
    found = find_regions(pyramid(levels, between), max_products=limit)
    assert [len(r.weights) for r in found] == wanted
