# SPDX-License-Identifier: Apache-2.0
"""Which values keep a sample's rows together, on graphs drawn op by op."""

from __future__ import annotations

import operator

import torch
from torch.fx import Node

from qgraph.graph.row_order import batch_sizes, first_size, rows_by_sample
from tests.graph.sketch import Sketch, aten

reshape, turn = aten.reshape.default, aten.transpose.int


class Drawn:
    """An input [B, 4, 6] of free B, and what is made of it."""

    def __init__(self, free: int = 1) -> None:
        self.s = Sketch()
        self.x = self.s.input(5, 4, 6, free=free)
        self.size = self.s.call(aten.sym_size.int, self.x, 0)

    def times(self, factor: int) -> Node:
        return self.s.call(operator.mul, self.size, factor)

    def kept(self, node: Node) -> bool:
        nodes = list(self.s.graph.nodes)
        return node in rows_by_sample(nodes, batch_sizes(nodes))


def test_first_sizes_are_told_where_they_are_free() -> None:
    d = Drawn(free=2)
    s = d.s
    first, second = d.x.meta["val"].shape[:2]
    assert first_size(d.x) == first.node.expr
    assert first_size(s.call(turn, d.x, 0, 1)) == second.node.expr
    assert first_size(s.call(turn, d.x, 0, 2)) is None
    assert first_size(s.call(aten.sum.default, d.x)) is None
    assert first_size(s.input(5, 4, name="fixed")) is None
    assert first_size(d.size) is None


def test_the_batch_is_the_first_size_of_inputs_alone() -> None:
    s = Sketch()
    x, y = s.input(5, 4, 6, free=2), s.input(7, 2, name="y", free=1)
    s.input(3, 2, name="fixed")
    s.call(turn, x, 0, 1)
    s.call(aten.cat.default, [x, x], 0)
    nodes = list(s.graph.nodes)
    assert batch_sizes(nodes) == {first_size(x), first_size(y)}
    assert len(batch_sizes(nodes)) == 2
    assert batch_sizes([]) == frozenset()


def test_what_keeps_or_regains_the_batch_in_front_is_by_sample() -> None:
    d = Drawn()
    s = d.s
    there = s.call(turn, d.x, 0, 1)
    weight = s.stored(torch.ones(6), "w")
    table = s.input(4, 6, name="table")
    for node in (
        d.x, weight, table, s.call(aten.relu.default, d.x), s.call(turn, d.x, 1, 2),
        s.call(turn, there, 0, 1), s.call(aten.add.Tensor, d.x, weight),
        s.call(aten.sum.dim_IntList, d.x, [0]),
    ):  # fmt: skip
        assert d.kept(node), node
    assert not d.kept(there)
    assert not d.kept(s.call(aten.relu.default, there))
    assert not d.kept(d.size)


def test_a_multiple_of_the_batch_is_one_while_rows_stay_where_they_were() -> None:
    d = Drawn()
    s = d.s
    many = s.call(reshape, d.x, [d.times(2), 2, 6])
    w = s.stored(torch.ones(2, 6), "w")
    flat = s.call(aten.flatten.using_ints, d.x, 0, 1)
    for node in (
        many, flat, s.call(aten.relu.default, many), s.call(aten.add.Tensor, many, w),
        s.call(aten.add.Tensor, w, many), s.call(aten.add.Tensor, many, many),
        s.call(aten.linear.default, flat, s.stored(torch.ones(3, 6), "fc")),
        s.call(reshape, many, [d.times(4), 6]), s.call(reshape, many, [d.size, 4, 6]),
    ):  # fmt: skip
        assert d.kept(node), node
    there = s.call(turn, d.x, 0, 1)
    mixed = s.call(reshape, there, [d.times(4), 6])
    for node in (
        mixed, s.call(aten.relu.default, mixed), s.call(reshape, mixed, [d.times(2), 2, 6]),
        s.call(aten.add.Tensor, flat, mixed), s.call(aten.add.Tensor, mixed, flat),
        s.call(aten.cat.default, [d.x, d.x], 0),
        s.call(aten.cat.default, [d.x, s.call(aten.relu.default, d.x)], 0),
        s.call(aten.cat.default, [many, many], 0),
        s.call(turn, many, 0, 1),
    ):  # fmt: skip
        assert not d.kept(node), node


def test_another_free_size_in_front_is_not_the_batch() -> None:
    d = Drawn(free=2)
    s = d.s
    there = s.call(turn, d.x, 0, 1)
    assert d.kept(d.x)
    assert not d.kept(there)
    assert not d.kept(s.call(aten.flatten.using_ints, there, 0, 1))
    assert d.kept(s.call(aten.flatten.using_ints, d.x, 0, 1))
    assert not d.kept(s.call(aten.sum.dim_IntList, d.x, [0]))


def test_parts_are_where_the_whole_is() -> None:
    d = Drawn()
    s = d.s
    many = s.call(reshape, d.x, [d.times(2), 2, 6])
    mixed = s.call(reshape, s.call(turn, d.x, 0, 1), [d.times(2), 2, 6])
    for whole, kept in ((d.x, True), (many, True), (mixed, False)):
        parts = s.call(aten.split.Tensor, whole, 2, -1)
        part = s.call(operator.getitem, parts, 1)
        assert d.kept(parts) is kept
        assert d.kept(part) is kept
