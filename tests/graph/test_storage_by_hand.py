# SPDX-License-Identifier: Apache-2.0
"""What is stored in drawn graphs, how wide and how long, against lists made by hand."""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import torch
from torch.fx import Node

from qgraph.graph.dialect import DEQUANTIZE, QUANTIZE
from qgraph.graph.edges import Edge
from qgraph.graph.ops import constants
from qgraph.graph.storage import Width, computes, hands_on, leaf_edges, stored_tensors
from tests.graph.sketch import Sketch, aten


def widths(**bits: int) -> Width:
    """Widths by the name of an edge, with `_` for its dots and brackets; else float."""
    known = dict(bits.items())
    return lambda edge: known.get(str(edge).replace("[", "__").replace(".", "_").rstrip("]"))


def test_what_hands_on_and_what_computes() -> None:
    s = Sketch()
    x = s.input(2, 6)
    one, zero = s.stored(torch.tensor(1.0), "s"), s.stored(torch.tensor(0), "z")
    codes = s.call(QUANTIZE, x, one, zero, 0, 15)
    values = s.call(DEQUANTIZE, codes, one, zero, 0, 15)
    parts = s.call(aten.split.Tensor, x, 3, -1)
    expected = {  # hands on, computes
        x: (False, False),
        one: (False, False),
        codes: (True, False),
        values: (True, False),
        parts: (True, False),
        s.call(operator.getitem, parts, 0): (True, False),
        s.call(aten.cat.default, [x, x], 1): (True, False),
        s.call(aten.transpose.int, x, 0, 1): (True, False),
        s.call(aten.relu.default, x): (False, True),
        s.call(aten.add.Tensor, x, x): (False, True),
        s.call(aten.gt.Scalar, x, 0): (False, False),
        s.call(aten.sym_size.int, s.input(3, 2, name="y", free=1), 0): (False, False),
        s.call(aten.neg.default, one): (False, False),
        s.call(aten.add.Tensor, x, one): (False, True),
        s.call(aten.topk.default, x, 2): (False, False),
    }
    fixed = constants(list(s.graph.nodes))
    for node, (moves, makes) in expected.items():
        assert hands_on(node) is moves, node
        assert computes(node, fixed) is makes, node


def test_readers_are_found_behind_moves_up_to_the_first_quantized_edge() -> None:
    s = Sketch()
    x = s.input(2, 6)
    a = s.call(aten.add.Tensor, x, 1.0)
    turned = s.call(aten.transpose.int, a, 0, 1)
    again = s.call(aten.transpose.int, turned, 0, 1)
    joined = s.call(aten.cat.default, [a, again, a], 1)
    relu = s.call(aten.relu.default, joined)
    product = s.call(aten.mul.Tensor, a, again)
    s.returns(relu, product, turned)
    end = s.module.graph.output_node()

    def found(width: Width) -> set[Edge]:
        edges = list(leaf_edges(a, width))
        assert len(edges) == len(set(edges))
        return set(edges)

    to_end, to_relu = Edge(end, (0, 2)), Edge(relu, (0,))
    factors = {Edge(product, (0,)), Edge(product, (1,))}
    assert found(widths()) == {to_end, to_relu} | factors
    assert found(widths(mul_tensor__1=4)) == {to_end, to_relu} | factors
    by_join = widths(cat_default__0_1=4)
    assert found(by_join) == {to_end, to_relu, Edge(joined, (0, 1))} | factors
    every = widths(cat_default__0_0=4, cat_default__0_1=4, cat_default__0_2=4)
    joins = {Edge(joined, (0, i)) for i in range(3)}
    assert found(every) == {to_end} | joins | factors
    early = widths(transpose_int__0=8)
    assert found(early) == {Edge(turned, (0,)), to_relu, Edge(product, (0,))}


@pytest.mark.parametrize(
    ("bits", "want"),
    [
        ({}, None),
        ({"mul_tensor__0": 4}, None),
        ({"mul_tensor__0": 4, "sub_tensor__1": 8}, 8),
        ({"mul_tensor__0": 8, "sub_tensor__1": 4}, 8),
        ({"mul_tensor__0": 4, "sub_tensor__1": 4}, 4),
    ],
)
def test_a_value_is_as_wide_as_its_widest_reader(bits, want):
    s = Sketch()
    x = s.input(2, 6)
    a = s.call(aten.add.Tensor, x, 1.0)
    s.returns(s.call(aten.mul.Tensor, a, x), s.call(aten.sub.Tensor, x, a))
    found = {item.node: item for item in stored_tensors(s.module, widths(**bits))}
    assert found[a].bits == want


ELEMENTWISE = aten.relu.default
Readers = Callable[[Sketch, Node], tuple[Node, ...]]
FUSED: dict[str, tuple[Readers, dict[str, int], bool]] = {
    "one function": (lambda s, a: (s.call(ELEMENTWISE, a),), {}, False),
    "one function, quantized": (
        lambda s, a: (s.call(ELEMENTWISE, a),), {"relu_default__0": 8}, True
    ),
    "two functions": (lambda s, a: (s.call(ELEMENTWISE, a), s.call(ELEMENTWISE, a)), {}, True),
    "one sum": (lambda s, a: (s.call(aten.add.Tensor, a, 2.0),), {}, True),
    "returned": (lambda s, a: (a,), {}, True),
    "returned twice": (lambda s, a: (a, a), {}, True),
    "a function behind a move": (
        lambda s, a: (s.call(ELEMENTWISE, s.call(aten.transpose.int, a, 0, 1)),), {}, False
    ),
    "a function and the output": (lambda s, a: (a, s.call(ELEMENTWISE, a)), {}, True),
}  # fmt: skip


@pytest.mark.parametrize("name", FUSED)
def test_what_one_function_alone_reads_in_float_never_leaves_the_kernel(name):
    readers, bits, stored = FUSED[name]
    s = Sketch()
    a = s.call(aten.mul.Tensor, s.input(2, 6), 3.0)
    s.returns(*readers(s, a))
    found = [item.node for item in stored_tensors(s.module, widths(**bits))]
    assert (a in found) is stored


def test_lives_sizes_and_readers_of_a_graph_by_hand() -> None:
    s = Sketch()
    x = s.input(3, 4, 5, free=2)  # step 0
    w = s.stored(torch.ones(7, 5), "w")  # 1
    scaled = s.call(aten.neg.default, w)  # 2: no input
    a = s.call(aten.linear.default, x, w)  # 3
    turned = s.call(aten.transpose.int, a, 1, 2)  # 4
    b = s.call(aten.add.Tensor, x, 1.0)  # 5
    unread = s.call(aten.mul.Tensor, b, 2.0)  # 6
    c = s.call(aten.linear.default, b, scaled)  # 7
    joined = s.call(aten.cat.default, [a, c], 2)  # 8
    d = s.call(aten.sum.dim_IntList, joined, [0])  # 9
    back = s.call(aten.transpose.int, turned, 1, 2)  # 10
    e = s.call(aten.sub.Tensor, back, c)  # 11
    s.returns(d, e)  # 12
    end = s.module.graph.output_node()
    bits = widths(
        linear_default_1__0=4, mul_tensor__0=6, cat_default__0_0=8, sub_tensor__0=3, sub_tensor__1=2
    )
    assert len(s.graph.nodes) == 13
    rows = [
        (i.node, i.elements, i.bits, i.born, i.last_read, i.leaves)
        for i in stored_tensors(s.module, bits)
    ]
    assert rows == [
        (a, 28, 8, 3, 11, (Edge(joined, (0, 0)), Edge(e, (0,)))),
        (b, 20, 6, 5, 7, (Edge(unread, (0,)), Edge(c, (0,)))),
        (unread, 20, None, 6, 6, ()),
        (c, 28, None, 7, 11, (Edge(d, (0,)), Edge(e, (1,)))),
        (d, 14, None, 9, 12, (Edge(end, (0, 0)),)),
        (e, 28, None, 11, 12, (Edge(end, (0, 1)),)),
    ]
    assert turned.op == "call_function"
