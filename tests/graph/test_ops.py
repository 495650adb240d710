# SPDX-License-Identifier: Apache-2.0
"""What is said about ATen ops: kinds, operands and axes, arguments, constants."""

from __future__ import annotations

import operator

import pytest
import torch
from torch.fx import Graph

from qgraph.graph.ops import (
    PRODUCTS,
    OpKind,
    argument,
    constants,
    is_float,
    kind,
    product,
)
from tests.graph.sketch import Sketch, aten

CONVS = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
TRANSPOSED = (
    aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input,
)  # fmt: skip
MATMULS = (aten.matmul.default, aten.bmm.default, aten.mm.default)


def test_products_name_their_operands_and_axes() -> None:
    assert set(PRODUCTS) == {aten.linear.default, *CONVS, *TRANSPOSED, *MATMULS}
    for targets, places in (
        ((aten.linear.default,), (0, 1, 2, -1, 0)),
        (CONVS, (0, 1, 2, 1, 0)),
        (TRANSPOSED, (0, 1, 2, 1, 1)),
        (MATMULS, (0, 1, None, -1, -1)),
    ):
        for target in targets:
            found = PRODUCTS[target]
            got = (found.data, found.weight, found.bias, found.data_axis, found.weight_axis)
            assert got == places, target


def test_the_axes_of_products_are_those_that_torch_contracts_and_makes() -> None:
    for target, data, weight in (
        (aten.linear.default, (2, 3, 5), (7, 5)),
        (CONVS[0], (2, 5, 9), (7, 5, 3)),
        (CONVS[1], (2, 5, 9, 8), (7, 5, 3, 2)),
        (CONVS[2], (2, 5, 4, 9, 8), (7, 5, 1, 3, 2)),
        (TRANSPOSED[0], (2, 5, 9), (5, 7, 3)),
        (TRANSPOSED[1], (2, 5, 4, 3), (5, 7, 3, 2)),
        (TRANSPOSED[2], (2, 5, 4, 3, 2), (5, 7, 3, 2, 1)),
        (MATMULS[0], (2, 3, 5), (2, 5, 7)),
        (MATMULS[1], (2, 3, 5), (2, 5, 7)),
        (MATMULS[2], (3, 5), (5, 7)),
    ):
        place = PRODUCTS[target]
        result = target(torch.ones(data), torch.ones(weight))
        assert data[place.data_axis] == 5
        assert weight[place.weight_axis] == 7
        assert result.shape[place.data_axis] == 7


def test_calls_are_of_the_kind_of_their_op_and_parts_of_that_of_the_whole() -> None:
    s = Sketch()
    x = s.input(2, 4)
    parts = s.call(aten.split.Tensor, x, 2, -1)
    largest = s.call(aten.max.dim, x, 1)
    for node, want in (
        (x, OpKind.OTHER),
        (s.stored(torch.ones(2)), OpKind.OTHER),
        (parts, OpKind.MOVE),
        (s.call(operator.getitem, parts, 0), OpKind.MOVE),
        (largest, OpKind.OTHER),
        (s.call(operator.getitem, largest, 0), OpKind.OTHER),
        (s.call(aten.relu.default, x), OpKind.ELEMENTWISE),
        (s.call(aten.sub.Tensor, x, x), OpKind.ADD),
        (s.call(aten.softmax.int, x, -1), OpKind.SOFTMAX),
        (s.call(aten.linear.default, x, x), OpKind.LINEAR),
        (s.call(aten.sort.default, x), OpKind.OTHER),
        (s.graph.call_function(operator.getitem, ((1, 2), 0)), OpKind.OTHER),
    ):
        assert kind(node) is want, node
        is_linear = want is OpKind.LINEAR
        assert (product(node) is not None) is is_linear


def test_only_calls_are_of_a_kind_whatever_their_target() -> None:
    graph = Graph()
    node = graph.create_node("call_method", "relu", (graph.placeholder("x"),))
    node.target = aten.linear.default
    assert kind(node) is OpKind.OTHER
    assert product(node) is None


@pytest.mark.parametrize(
    ("args", "kwargs", "want"),
    [
        (("x", "w"), {}, ["x", "w", None, [1, 1], [0, 0], [1, 1], 1, None]),
        (("x", "w", "b", [2, 2]), {}, ["x", "w", "b", [2, 2], [0, 0], [1, 1], 1, None]),
        (("x", "w"), {"groups": 3, "bias": "b"}, ["x", "w", "b", [1, 1], [0, 0], [1, 1], 3, None]),
        (
            ("x", "w", None, [1, 1], [0, 0], [1, 1], 4), {},
            ["x", "w", None, [1, 1], [0, 0], [1, 1], 4, None],
        ),
        ((), {"weight": "w", "input": "x"}, ["x", "w", None, [1, 1], [0, 0], [1, 1], 1, None]),
    ],
)  # fmt: skip
def test_arguments_are_found_by_place_by_name_or_by_default(args, kwargs, want):
    node = Graph().call_function(aten.conv2d.default, args, kwargs)
    got = [argument(node, i) for i in range(8)]
    full = [n * 2 if isinstance(n, list) and len(n) == 1 else n for n in got]
    assert full == want


def test_calls_without_a_schema_have_no_more_arguments_than_are_given() -> None:
    node = Graph().call_function(operator.add, (1, 2))
    assert [argument(node, i) for i in range(3)] == [1, 2, None]


def test_values_of_floats_are_told_from_all_others() -> None:
    s = Sketch()
    x = s.input(2, 4)
    for node, want in (
        (x, True),
        (s.input(2, name="i", dtype=torch.int32), False),
        (s.input(2, name="h", dtype=torch.float16), True),
        (s.call(aten.gt.Scalar, x, 0), False),
        (s.call(aten.split.Tensor, x, 2, -1), False),
        (s.graph.placeholder("unknown"), False),
    ):
        assert is_float(node) is want, node


def test_constants_are_what_depends_on_no_input() -> None:
    s = Sketch()
    x, w = s.input(2, 4), s.stored(torch.ones(4))
    scaled = s.call(aten.mul.Tensor, w, 2.0)
    both = s.call(aten.add.Tensor, scaled, w)
    fresh = s.call(aten.ones.default, [4])
    mixed = s.call(aten.add.Tensor, x, both)
    later = s.call(aten.neg.default, mixed)
    nodes = list(s.returns(later).graph.nodes)
    assert constants(nodes) == {w, scaled, both, fresh}
    s = Sketch()
    module = s.returns(s.call(aten.neg.default, s.stored(torch.ones(4))))
    assert module.graph.output_node() not in constants(list(module.graph.nodes))
