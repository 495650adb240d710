# SPDX-License-Identifier: Apache-2.0
"""The walk of the integer backend: what is computed once, what is written over, what is shared."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from qgraph.backends import integer
from qgraph.backends.integer.emitter import Emitter
from qgraph.backends.integer.reuse import IN_PLACE
from qgraph.backends.semantics import analyze
from tests.backends.exact import by_axis, coded, decode, drawn, encode
from tests.backends.single_ops import SingleOp

aten = torch.ops.aten
X = torch.randn(3, 4, generator=torch.Generator().manual_seed(5)) * 0.1
BYTES = coded(0, 255, 100)


def read_input(b: SingleOp) -> Node:
    return decode(b, encode(b, b.placeholder("x", X), "x", BYTES), "x", BYTES)


def of_inputs(graph: Graph) -> dict[Node, bool]:
    """Which nodes depend on an input."""
    found: dict[Node, bool] = {}
    for node in graph.nodes:
        found[node] = node.op == "placeholder" or any(found[n] for n in node.all_input_nodes)
    return found


@pytest.mark.parametrize("mode", ["onnxruntime", "fixed_point"])
def test_what_depends_on_no_input_is_computed_once(mode: integer.Mode) -> None:
    b = SingleOp()
    x, grid = read_input(b), by_axis(5, 0, -8, 7)
    w = torch.randn(5, 4, generator=torch.Generator().manual_seed(6)) * 0.01
    codes = encode(b, b.call(aten.neg.default, b.buffer("w", w)), "w", grid)
    weight = b.call(aten.clone.default, decode(b, codes, "w", grid))
    module = b.finish(b.call(aten.linear.default, x, weight))
    lowered = integer.lower(module, mode=mode)
    depends = of_inputs(lowered.graph_module.graph)
    assert [n for n, does in depends.items() if n.op == "call_function" and not does] == []
    exact = BYTES.fake(X).double() @ grid.fake(-w).double().t()
    assert torch.equal(lowered(X)[0].double(), exact.float().double())


def written_over(module: GraphModule) -> list[Node]:
    return [n for n in module.graph.nodes if n.target in IN_PLACE.values()]


def test_operands_are_written_over_unless_a_compiler_decides() -> None:
    b = SingleOp()
    x, grid = read_input(b), coded(-8, 7)
    codes = b.buffer("w", drawn(grid, (5, 4), 7).to(torch.int8))
    y = b.call(aten.linear.default, x, decode(b, codes, "w", grid))
    found = analyze(b.finish(encode(b, y, "y", BYTES)))
    plain, seen = (Emitter(found, compiled=c).lower() for c in (False, True))
    assert written_over(plain)
    assert not written_over(seen)
    for ours, theirs in zip(plain(X), seen(X), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_any_number_of_values_of_one_encoding_are_joined_as_codes(count: int) -> None:
    b = SingleOp()
    x = read_input(b)
    joined = b.call(aten.cat.default, [x] * count, 1)
    lowered = integer.lower(b.finish(encode(b, joined, "y", BYTES)))
    wanted: Tensor = BYTES.encode(X).repeat(1, count)
    assert torch.equal(lowered(X)[0], wanted)
