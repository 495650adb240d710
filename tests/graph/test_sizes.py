# SPDX-License-Identifier: Apache-2.0
"""Sizes of values: numbers where they are fixed, reads where they are free."""

from __future__ import annotations

import pytest
import torch
from torch.fx import Node

from qgraph.graph.sizes import rank_of, same_shape, shape_of, size_of
from tests.graph.sketch import Sketch, aten


def test_ranks_and_shapes_of_values_and_of_what_is_none() -> None:
    s = Sketch()
    x, y = s.input(3, 4, 5, free=1), s.input(3, 4, 5, name="y")
    point = s.call(aten.sum.default, y)
    size = s.call(aten.sym_size.int, x, 0)
    assert [rank_of(n) for n in (x, y, point, size)] == [3, 3, 0, 0]
    assert shape_of(y) == (3, 4, 5)
    assert shape_of(x)[1:] == (4, 5)
    assert shape_of(point) == shape_of(size) == ()


def test_shapes_are_the_same_only_where_that_is_known() -> None:
    s = Sketch()
    x, y = s.input(3, 4, free=1), s.input(3, 4, name="y", free=1)
    fixed, other = s.input(3, 4, name="f"), s.input(6, 4, name="o", free=1)
    turned = s.call(aten.transpose.int, fixed, 0, 1)
    longer = s.call(aten.unsqueeze.default, fixed, 2)
    shorter = s.call(aten.select.int, fixed, 1, 0)
    for first, second, same in (
        (x, y, True), (fixed, fixed, True), (x, fixed, False), (x, other, False),
        (fixed, turned, False), (fixed, longer, False), (fixed, shorter, False),
        (s.call(aten.relu.default, x), y, True),
        (fixed, s.call(aten.slice.Tensor, fixed, 1, 0, 3), False),
        (fixed, s.call(aten.slice.Tensor, fixed, 0, 0, 2), False),
        (s.input(name="p"), s.call(aten.sum.default, fixed), True),
    ):  # fmt: skip
        assert same_shape(first, second) is same
        assert same_shape(second, first) is same


@pytest.mark.parametrize("axis", [0, 1, 2, -1, -2, -3])
@pytest.mark.parametrize("free", [0, 1, 2, 3])
def test_a_size_is_a_number_or_is_read_at_run_time(axis, free):
    s = Sketch()
    x = s.input(3, 4, 5, free=free)
    end = s.call(aten.relu.default, x)
    found = size_of(s.module, x, axis, before=end)
    if axis % 3 >= free:
        assert found == (3, 4, 5)[axis]
        assert type(found) is int
        return
    assert isinstance(found, Node)
    assert found.next is end
    assert found.args == (x, axis % 3)
    s.returns(end, found)
    sizes = [6, 7, 8][:free] + [3, 4, 5][free:]
    assert s.module(torch.ones(sizes))[1] == sizes[axis]
