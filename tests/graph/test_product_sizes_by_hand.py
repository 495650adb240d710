# SPDX-License-Identifier: Apache-2.0
"""Counts of drawn products, against counting the multiplications one by one."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch.fx import Node

from qgraph.graph.product_sizes import ProductSize, product_sizes
from tests.graph.sketch import Sketch, aten

Draw = Callable[[Sketch], Node]


def size(*numbers: int) -> ProductSize:
    names = ("parameters", "channels", "biases", "macs", "inputs", "outputs")
    return ProductSize(**dict(zip(names, numbers, strict=True)))


def stored(s: Sketch, *shape: int, name: str = "w") -> Node:
    return s.stored(torch.ones(shape), name)


def count(*ranges: int) -> int:
    """How often the innermost statement of such loops runs."""
    return sum(1 for _ in itertools.product(*map(range, ranges)))


CASES: dict[str, tuple[Draw, ProductSize]] = {
    "linear": (
        lambda s: s.call(
            aten.linear.default, s.input(2, 3, 5), stored(s, 7, 5), stored(s, 7, name="b")
        ),
        size(35, 7, 7, count(3, 7, 5), 15, 21),
    ),
    "linear of rows": (
        lambda s: s.call(aten.linear.default, s.input(2, 5), stored(s, 7, 5)),
        size(35, 7, 0, count(7, 5), 5, 7),
    ),
    "linear of free sizes": (
        lambda s: s.call(aten.linear.default, s.input(3, 4, 5, free=2), stored(s, 7, 5), None),
        size(35, 7, 0, count(4, 7, 5), 20, 28),
    ),
    "computed weight": (
        lambda s: s.call(
            aten.linear.default, s.input(2, 5), s.call(aten.neg.default, stored(s, 7, 5)),
            s.call(aten.neg.default, stored(s, 7, name="b")),
        ),
        size(35, 7, 7, 35, 5, 7),
    ),
    "weight from an input": (
        lambda s: s.call(aten.linear.default, s.input(2, 5), s.input(7, 5, name="w")),
        size(0, 0, 0, 35, 5 + 5, 7),
    ),
    "named operands": (
        lambda s: s.call(
            aten.linear.default, s.input(2, 5), weight=stored(s, 7, 5), bias=stored(s, 7, name="b")
        ),
        size(35, 7, 7, 35, 5, 7),
    ),
    "convolution over time": (
        lambda s: s.call(
            aten.conv1d.default, s.input(2, 4, 9), stored(s, 6, 2, 3), stored(s, 6, name="b"),
            [2], [1], [1], 2,
        ),
        size(36, 6, 6, count(6, 5, 2, 3), 36, 30),
    ),
    "convolution of volumes": (
        lambda s: s.call(aten.conv3d.default, s.input(2, 3, 4, 5, 6), stored(s, 2, 3, 1, 2, 3)),
        size(36, 2, 0, count(2, 4, 4, 4, 3, 1, 2, 3), 360, 128),
    ),
    "transposed": (
        lambda s: s.call(
            aten.conv_transpose2d.input, s.input(2, 4, 3, 5), stored(s, 4, 6, 2, 3), None, [2, 3]
        ),
        size(144, 6, 0, count(4, 3, 5, 6, 2, 3), 60, 6 * 6 * 15),
    ),
    "transposed in groups": (
        lambda s: s.call(
            aten.conv_transpose1d.default, s.input(2, 4, 3), stored(s, 4, 3, 2),
            stored(s, 6, name="b"), [2], [0], [0], 2,
        ),
        size(24, 3, 6, count(4, 3, 3, 2), 12, 36),
    ),
    "matmul of activations": (
        lambda s: s.call(aten.matmul.default, s.input(2, 3, 4, 5), s.input(2, 3, 5, 6, name="y")),
        size(0, 0, 0, count(3, 4, 6, 5), 60 + 90, 72),
    ),
    "matmul with a table": (
        lambda s: s.call(aten.matmul.default, s.input(2, 4, 5), stored(s, 5, 6)),
        size(30, 6, 0, count(4, 6, 5), 20, 24),
    ),
    "matmul of a table": (
        lambda s: s.call(aten.matmul.default, stored(s, 2, 4, 5), s.input(2, 5, 6)),
        size(0, 0, 0, count(4, 6, 5), 20 + 30, 24),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_counts_are_those_of_the_loops(name):
    draw, want = CASES[name]
    s = Sketch()
    node = draw(s)
    assert product_sizes(s.returns(node)) == {node.name: want}


def test_products_come_in_order_and_those_of_no_input_not_at_all() -> None:
    s = Sketch()
    x = s.input(2, 5)
    w, v = stored(s, 5, 5), stored(s, 5, 5, name="v")
    fixed = s.call(aten.matmul.default, w, v)
    first = s.call(aten.linear.default, x, fixed)
    second = s.call(aten.linear.default, s.call(aten.relu.default, first), w)
    assert list(product_sizes(s.returns(second))) == [first.name, second.name]
